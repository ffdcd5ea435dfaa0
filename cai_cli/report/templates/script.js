// Filters: a search over the text of the items and selects over their attributes. Without JavaScript all items are visible.
const FIRST = 10; // items visible before "Show all"

for (const box of document.querySelectorAll("[data-filter]")) {
  const items = [...box.querySelectorAll("[data-item]")];
  const texts = items.map((item) => item.textContent.toLowerCase());
  const bar = box.querySelector(".toolbar");
  const search = bar.querySelector("input");
  const selects = [...bar.querySelectorAll("select")];
  const output = bar.querySelector("output");
  const open = bar.querySelector("[data-open]");
  const none = box.querySelector(".none");
  const more = box.querySelector(".more-items");
  const moreButton = more.querySelector("[data-more]");
  let limit = FIRST;

  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let matches = 0;
    items.forEach((item, i) => {
      const fits = words.every((word) => texts[i].includes(word)) && selects.every(
        (select) => !select.value || JSON.parse(item.dataset[select.dataset.by]).includes(select.value));
      matches += fits;
      item.hidden = !fits || matches > limit;
    });
    more.hidden = matches <= limit;
    moreButton.textContent = `Show all ${matches}`;
    output.textContent = `${matches} of ${items.length} ${output.dataset.what}`;
    none.hidden = matches > 0;
  };
  const allOpen = () => items.every((item) => item.hidden || item.open);
  const label = () => { open.textContent = allOpen() ? "Close all" : "Open all"; };

  search.addEventListener("input", () => { apply(); label(); });
  selects.forEach((select) => select.addEventListener("change", () => { apply(); label(); }));
  open.addEventListener("click", () => {
    const to = !allOpen();
    items.forEach((item) => { if (!item.hidden) item.open = to; });
    label();
  });
  items.forEach((item) => item.addEventListener("toggle", label));
  moreButton.addEventListener("click", () => {
    limit = Infinity;
    const next = items.find((item) => item.hidden);
    apply();
    label();
    if (next) next.querySelector("summary").focus();
  });
  none.querySelector("[data-clear]").addEventListener("click", () => {
    search.value = "";
    selects.forEach((select) => { select.value = ""; });
    apply();
    label();
    search.focus();
  });
  bar.hidden = false;
  apply();
  label();
}
