// Filters: a search over the text of the items and selects over their attributes. Without script all items are shown.
for (const box of document.querySelectorAll("[data-filter]")) {
  const items = [...box.querySelectorAll("[data-item]")];
  const texts = items.map((item) => item.textContent.toLowerCase());
  const bar = box.querySelector(".toolbar");
  const search = bar.querySelector("input");
  const selects = [...bar.querySelectorAll("select")];
  const output = bar.querySelector("output");
  const open = bar.querySelector("[data-open]");
  const none = box.querySelector(".none");

  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    items.forEach((item, i) => {
      const fits = words.every((word) => texts[i].includes(word)) && selects.every(
        (select) => !select.value || JSON.parse(item.dataset[select.dataset.by]).includes(select.value));
      item.hidden = !fits;
      shown += fits;
    });
    output.textContent = `${shown} of ${items.length} ${output.dataset.what}`;
    none.hidden = shown > 0;
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
  none.querySelector("[data-clear]").addEventListener("click", () => {
    search.value = "";
    selects.forEach((select) => { select.value = ""; });
    apply();
    label();
    search.focus();
  });
  bar.hidden = false;
  label();
}
