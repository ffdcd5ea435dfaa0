"""`python -m cai_cli.cli.fork_server`: the process that `cai run` forks steps from (`pipeline.step_process`)."""

import signal
import sys

if __name__ == "__main__":
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the interrupt of a terminal is for the step

    from cai_cli.cli.app import main
    from cai_cli.pipeline.step_process import fork_steps

    if arguments := fork_steps(int(sys.argv[1]), int(sys.argv[2])):
        signal.signal(signal.SIGINT, on_interrupt)
        sys.argv = ["cai", *arguments]
        main()
