"""Finds what marks a text as a wrapped revision or as a critique, in English, Chinese, Japanese and Thai.

Both are marked by words about a reply as such: "a revised response:", "the assistant's last response is harmful".
Openings that a good reply may have too ("Here are some ways to improve your sleep", "Your answer is correct, but") do
not count.
"""

import re

_OPENING = 250  # characters in which a wrapper or a critique declares itself

# --- English ------------------------------------------------------------------------------------------------------

_NEW = (
    r"(?:revised|re-?written|updated|improved|edited|reworded|rephrased|corrected|modified|adjusted|refined|better"
    r"|alternative|new"
    r"|more\s\w+(?:,?\s(?:and\s)?\w+)?)"
)
_REVISED = r"(?:revised|re-?written|updated|improved|edited|reworded|rephrased|corrected|modified|adjusted|refined)"
_REPLY = r"(?:reply|response|answer)"
_REWRITE = r"(?:revision|re-?write)"
_SPEAKER = r"(?:the|an?)\s(?:ai\s|virtual\s|chat\s?)?(?:assistant|chat\s?bot|bot|ai|language\smodel)"
_OLD = r"(?:last|previous|preceding|above|original|initial|first|prior)"
_HARM = (
    r"(?:harm(?:ful|s)?|unethical|racis[tm]|sexis[tm]|toxic|dangerous|illegal|offensive|inappropriate|insensitive|disrespectful"
    r"|biased|problematic|misleading|hateful|derogatory|stereotyp\w*|discriminat\w*|unsafe|irresponsible"
    r"|condescending|prejudiced|immoral|insulting|demeaning|violen(?:t|ce))"
)
_START = r"(?:\A|[.!?:,…]\s+|\n)\W*"

_WRAPPERS = (
    # "Here is a revised response", "Below is my attempt at a more polite answer"
    rf"""{_START}(?:here\ is|here's|this\ is|below\ is|the\ following\ is|here\ you\ go)\W+
         (?:(?:a|an|the|my|one|another)\s+)(?:\w+\s+){{0,3}}?
         (?:{_NEW}\s+(?:\w+\s+){{0,2}}?{_REPLY}\b
           |(?:{_REWRITE}|(?:\w+\s+)?version)\ of\ (?:the|my)\ (?:\S+\s+){{0,3}}?{_REPLY}\b
           |(?:{_NEW}\s+(?:\w+\s+){{0,2}}?version|{_REWRITE})
            (?:\ of\ (?:(?:the|my)\ (?:\S+\s+){{0,3}}?{_REPLY})|(?!\ of\b)[^.!?:\n]{{0,80}}(?:[:\n]|\Z)))""",
    # "Revised response:", "**Revised Response**", "The rewritten version would be:", "Revision:"
    rf"""{_START}(?:(?:my|the|a)\s+)?(?:final\s+)?{_REVISED}\s+(?:\w+\s+)?(?:{_REPLY}|version)\b(?:\s+\w+){{0,3}}\W*?(?:[:\n])""",
    r"""\A\W*(?:revision|rewrite|revised|re-?written)\s*(?:[:\n])""",
    r"""\A\W*assistant\s*\(\w+\)\s*:""",
    # "Here is the reply, rewritten to be kind", "Here's how I would rewrite it", "Here are the edits to my reply"
    rf"""{_START}(?:here\ is|here's|this\ is|below\ is)\s+(?:the|my)\s+(?:\S+\s+){{0,3}}?{_REPLY},?\s+{_REVISED}\b""",
    rf"""{_START}(?:here\ is|here's)\s+(?:how\s+I\s+(?:would|might)|how\s+to|one\s+way\s+to)\s+
         (?:revise|re-?write|rephrase|reword)\s+(?:the|my|this)\s+(?:\S+\s+){{0,3}}?{_REPLY}\b""",
    rf"""{_START}here\ are\ (?:the|my)\ (?:revisions|edits|changes)\s+(?:to|of)\s+
         (?:the|my)\s+(?:\S+\s+){{0,3}}?{_REPLY}\b""",
    # "I have rewritten my response", "Let me rephrase the reply"
    rf"""{_START}(?:I\ have|I've|I)\s+(?:\w+\s+)?(?:{_REVISED}|re-?wrote)\s+
         (?:the|my|this|that)\s+(?:\S+\s+){{0,2}}{_REPLY}\b""",
    rf"""{_START}(?:let\ me|I\ will|I'll|I\ can|I\ would|I'd)\s+(?:\w+\s+)?(?:revise|re-?write|rephrase|reword)\s+
         (?:the|my|this|that)\s+(?:\S+\s+){{0,2}}{_REPLY}\b""",
)
# A remark after the revision. It is looked for in the whole text, so what stands before it is bounded.
_REMARKS = (
    rf"""\n[^\w\n]{{0,12}}(?:(?:note|explanation)\W{{1,12}})?(?:in\s)?(?:this|the|my)\s+{_REVISED}\s+(?:\w+\s+)?{_REPLY}\b""",
    rf"""\n[^\w\n]{{0,12}}(?:(?:note|explanation)\W{{1,12}})?(?:I\ have|I've|I)\s+(?:\w+\s+)?(?:{_REVISED}|re-?wrote)
         \s+(?:the|my)\s+(?:\S+\s+){{0,2}}{_REPLY}\b""",
)
_CRITIQUES = (
    r"\A\W*(?:self-?)?critique\W*:|critique\s?request\s*:|revision\s?request\s*:",
    # "The assistant's last response", "The assistant should not have helped": nobody answers a user in these words.
    rf"""\b{_SPEAKER}'s\ (?:\w+\s+){{0,2}}?(?:{_REPLY}|message|statement|advice|suggestion)\b""",
    rf"""\b{_REPLY}\s+(?:given|provided|written)\s+by\s+{_SPEAKER}\b
         |\bthe\ model's\ {_REPLY}\s+\w+\s+(?:\w+\s+){{0,3}}?{_HARM}\b""",
    rf"""{_START}in\ (?:its|the|this)\ (?:\w+\s+){{0,2}}?{_REPLY},?\s+{_SPEAKER}\b""",
    rf"""{_START}the\ (?:ai\s)?assistant\s+
         (?:provide[sd]|gives|gave|ma[dk]es?|respond(?:s|ed)|answer(?:s|ed)|helped|helps|tells|told|said|says|is|was|use[sd])\b[^.!?\n]{{0,120}}?{_HARM}\b""",
    rf"""{_START}{_SPEAKER}\s+(?:\w+ly\s+)?
         (?:should(?:n't|\snot)?\shave|could\shave|(?:made|makes)\s(?:a|an)\s(?:\w+\s)?(?:mistake|error)|fail(?:s|ed)\sto
           |(?:is|was|could\sbe|may\sbe|might\sbe)\s(?:\w+\s){{0,3}}?{_HARM}
           |(?:encourages?d?|promotes?d?|condones?d?|suggests?|suggested|implie[sd]|assume[sd])\b
           |(?:correctly|rightly|wrongly)\s\w+ed)\b""",
    # "The reply tells", "The response fails to"
    rf"""(?:{_START}|\b(?:and|but|yet)\s)(?:the|this)\ reply\s+
         (?:does|did|should|could|tells|says|gives|leaves|puts|uses|lacks|fails|refuses|ignores|encourages|promotes|suggests
           |implies|assumes|contains|provides|makes|scolds|treats)\b""",
    r"""\A\W*(?:the|this|that)\ response\s+
         (?:fails\ to|lacks|should\ (?:not\ )?have|could\ have|does\ not\ (?:address|acknowledge|consider|provide|take)
           |is\ not\ (?:helpful|appropriate|respectful))\b""",
    r"""\A\W*the\ human\ (?:wants|asks|asked|is\sasking|seems|appears)\b""",
    # "The last reply was rude"
    rf"""\A\W*(?:in\s)?(?:the|this|that|your)\ (?:last|previous|preceding|above)\ (?:assistant\s)?{_REPLY}\s+\w+""",
    # "This response is harmful", "My first answer could be seen as offensive"
    rf"""\A\W*(?:(?:the|this|that|your|my)\ (?:{_OLD}\ )?(?:reply|response)|(?:my|the)\ {_OLD}\ {_REPLY})\s+
         (?:is|was|does|did|could|should|would|may|might|can|has|had|seems?|appears?|contains?|encourages?|promotes?|suggests?
           |condones?|normali[sz]es?|implies|provides?|uses?|makes?)\s+(?:\S+\s+){{0,4}}?
           (?:{_HARM}|break\ the\ law|crimes?|hatred)\b""",
)
_ASKS_FOR_WORDING = re.compile(
    r"\bhow\s(?:\w+\s){1,3}(?:reply|respond|answer)\b|\bwhat\s(?:\w+\s){1,3}(?:reply|respond|answer|say)\b|"
    r"\b(?:re-?write|revise|edit|improve|rephrase|reword|proof-?read|correct|fix|paraphrase|polish|shorten)\b.{0,60}?"
    r"\b(?:e-?mails?|essays?|sentences?|paragraphs?|letters?|texts?|answers?|response|reply|code|poems?|story|resume|cv"
    r"|messages?|drafts?|posts?|article|version|wording|speech|following)\b",
    re.IGNORECASE | re.DOTALL,
)

# --- scripts without spaces ---------------------------------------------------------------------------------------

_WRAPPERS_UNSPACED = (
    # Chinese
    r"(?:以下|下面|这里|這裡|这|這)(?:就)?(?:是|为).{0,12}?(?:修改|修订|修訂|改写|改寫|重写|重寫|更新|改进|改進|修正|调整)"
    r".{0,4}?(?:回复|回答|答复|回應|回覆|回应|(?:版本|版).{0,20}?[:：\n])",
    r"\A\W*(?:以下|下面|这|這)(?:就)?(?:是|为)(?:一个)?更.{1,8}?的(?:回复|回答|答复|回應|回覆|回应)\W*?[:：\n]",
    r"\A\W*(?:修改|修订|修訂|改写|改寫|重写|重寫|修正|改进|改進)如下",
    r"\A\W*(?:我的)?(?:修改|修订|修訂|改写|改寫|重写|重寫|修正|改进|改進|更新)(?:过|后|過|後)?的?(?:回复|回答|答复|回應|回覆|回应|版本|版)"
    r"(?:如下)?\W*?[:：\n]",
    # Japanese
    r"(?:以下|こちら|次|これ)(?:は|が|に).{0,15}?(?:修正|改訂|書き直|改善|更新|訂正).{0,8}?"
    r"(?:返答|応答|回答|返信|(?:バージョン|版).{0,10}?[:：。\n])",
    r"\A\W*(?:修正|改訂|改善|訂正|書き直し|書き直した)(?:版|後|済み|した|された)?の?(?:返答|応答|回答|返信|バージョン)?\W*?[:：\n]",
    # Thai
    r"(?:นี่คือ|ต่อไปนี้(?:คือ|เป็น)|ด้านล่างนี้?คือ).{0,20}?(?:คำตอบ|การตอบกลับ|ฉบับ|เวอร์ชัน).{0,20}?(?:ปรับปรุง|แก้ไข|เขียนใหม่|ปรับแก้)",
    r"\A\W*(?:คำตอบ|การตอบกลับ|ฉบับ|เวอร์ชัน)(?:ที่)?(?:ได้รับการ|ถูก)?(?:ปรับปรุง|แก้ไข|เขียนใหม่|ปรับแก้|ใหม่)(?:แล้ว|ใหม่)?\s*[:\n]",
)
_CRITIQUES_UNSPACED = (
    r"\A\W*(?:批评|批評|批判|评论|評論|論評|บทวิจารณ์|คำวิจารณ์|การวิจารณ์)\s*[:：]",
    # Chinese
    r"(?:助手|助理|人工智能|AI)(?:的|在)?(?:上一个|上一條|上一条|最后一个|最后的?|最後的?|上述|之前的|这个|這個)?(?:回复|回答|答复|回應|回覆|回应)",
    r"\A\W*(?:上一个|上一条|上一條|之前的|最后的|最後的|上述|该|該|这个|這個|这条|我(?:之前|上一个|的上一个)的?)"
    r"(?:回复|回答|答复|回應|回覆|回应).{0,20}?"
    r"(?:有害|不道德|种族主义|歧视|歧視|冒犯|危险|危險|违法|違法|不当|不當|不合适|不恰当|偏见|偏見|攻击|攻擊|不妥|无礼|误导|粗鲁)",
    # Japanese
    r"アシスタントの(?:最後の|前の|直前の|この|上記の)?(?:返答|応答|回答|返信|発言)",
    r"\A\W*(?:この|前の|最後の|直前の|上記の|先ほどの|私の前の)(?:返答|応答|回答|返信).{0,30}?"
    r"(?:有害|非倫理|差別|攻撃的|危険|違法|不適切|偏見|失礼|侮辱|誤解)",
    # Thai
    r"(?:คำตอบ|การตอบกลับ|การตอบ)(?:ล่าสุด|สุดท้าย|ก่อนหน้า|ก่อนหน้านี้)?ของ(?:ผู้ช่วย|AI|เอไอ)",
    r"\A\W*คำตอบ(?:นี้|ก่อนหน้านี้|ก่อนหน้า|ล่าสุด|สุดท้าย|ข้างต้น).{0,40}?(?:อันตราย|ผิดจริยธรรม|เหยียด|ไม่เหมาะสม|ผิดกฎหมาย|อคติ|หยาบคาย|รุนแรง)",
)


def _any(patterns: tuple[str, ...], unspaced: tuple[str, ...]) -> re.Pattern[str]:
    spaced = (rf"(?x:{pattern})" for pattern in patterns)
    return re.compile("|".join((*spaced, *unspaced)), re.IGNORECASE)


_WRAPPER = _any(_WRAPPERS, _WRAPPERS_UNSPACED)
_REMARK = _any(_REMARKS, ())
_CRITIQUE = _any(_CRITIQUES, _CRITIQUES_UNSPACED)


def is_wrapped(text: str, user_message: str = "") -> bool:
    """Whether a revision presents itself as a revision, before it starts or after it ends.

    Args:
        text: The revision.
        user_message: The user's last message. Where it asks to reword a text, a revised version is the proper reply.
    """
    if _ASKS_FOR_WORDING.search(user_message):
        return False
    return bool(_WRAPPER.search(text[:_OPENING]) or _REMARK.search(text))


def is_critique(text: str) -> bool:
    """Whether a text describes or criticises a reply instead of being one."""
    return bool(_CRITIQUE.search(text[:_OPENING]))
