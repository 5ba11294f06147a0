"use strict";
// The list of images: filtered, sorted, shown in steps, and each in a large view of its own.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [ADDRESS, NAME, FOLDER, QUOTED, PICTURE, WIDTH, HEIGHT, QUALITY, MISTAKES, ITEMS] =
    Array(10).keys();
  const STEP = 24;
  // Of each image the items [kind, class, other class, count], as pages.py packed them.
  for (const image of data.images) {
    const items = [], kinds = data.kinds.length, classes = data.classes.length;
    for (const number of image[ITEMS]) {
      if (number < 0) items.at(-1)[3] = -number;
      else {
        const pair = Math.floor(number / kinds);
        items.push([number % kinds, Math.floor(pair / classes), pair % classes, 1]);
      }
    }
    image[ITEMS] = items;
  }
  const byId = (id) => document.getElementById(id);
  const list = byId("list"), status = byId("status"), more = byId("more");
  const chosenClass = byId("class"), order = byId("order"), dialog = byId("large");
  const filter = { class: 0, kind: -1, pair: null };
  let shown = [], count = 0, current = -1;

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const sign = (kind) => byId(`sign-${data.kinds[kind][0]}`).content.firstElementChild.cloneNode(true);

  // --- Which images ---

  const fits = ([kind, truth, found]) =>
    (!filter.class || truth === filter.class || found === filter.class) &&
    (filter.kind < 0 || kind === filter.kind) &&
    (!filter.pair || (truth === filter.pair[0] && found === filter.pair[1]));
  const unfiltered = () => !filter.class && filter.kind < 0 && !filter.pair;

  const orders = {
    worst: null,
    mistakes: (a, b) => b[MISTAKES] - a[MISTAKES],
    name: (a, b) => String(a[NAME]).localeCompare(String(b[NAME]), undefined, { numeric: true }),
  };

  function update() {
    shown = unfiltered() ? [...data.images] : data.images.filter((image) => image[ITEMS].some(fits));
    if (orders[order.value]) shown.sort(orders[order.value]);
    const words = [`${shown.length} of ${data.images.length} images`];
    if (filter.class) words.push(data.classes[filter.class]);
    if (filter.kind >= 0) words.push(data.kinds[filter.kind][1]);
    if (filter.pair) {
      const [truth, found] = filter.pair;
      if (!truth) words.push(`${data.classes[found]} detected where there is none`);
      else if (!found) words.push(`${data.classes[truth]} missed`);
      else words.push(`${data.classes[truth]} detected as ${data.classes[found]}`);
    }
    status.textContent = words.join(" · ");
    byId("reset").hidden = unfiltered();
    chosenClass.value = String(filter.class);
    for (const button of document.querySelectorAll("[data-kind]"))
      button.setAttribute("aria-pressed", String(Number(button.dataset.kind) === filter.kind));
    for (const row of document.querySelectorAll("tr[data-row]")) {
      if (Number(row.dataset.row) === filter.class) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
    }
    list.replaceChildren();
    count = 0;
    showMore();
  }

  function showMore() {
    const next = shown.slice(count, count + STEP);
    list.append(...next.map(card));
    count += next.length;
    more.hidden = count >= shown.length;
    more.textContent = `Show ${Math.min(STEP, shown.length - count)} more of ${shown.length - count}`;
  }

  // --- An image in the list ---

  const anchor = (image) => `#image-${encodeURIComponent(image[ADDRESS])}`;
  const link = (image) =>
    image[FOLDER] < 0 ? null : `${data.folders[image[FOLDER]]}/${image[QUOTED] || image[NAME]}`;

  function picture(image, suffix, caption, lazy) {
    const loading = lazy ? "lazy" : "eager", base = `pictures/${image[PICTURE]}`;
    const box = make("div", { class: "picture" },
      make("img", { src: `${base}.jpg`, alt: `${caption}: ${image[NAME]}`, loading }),
      make("img", { src: `${base}${suffix}.svg`, alt: "", class: "marks", loading }));
    box.style.setProperty("--ratio", image[WIDTH] && image[HEIGHT] ? image[WIDTH] / image[HEIGHT] : 1);
    return box;
  }

  function counts(image, detailed) {
    const byKind = new Map();
    for (const [kind, truth, found, number] of image[ITEMS]) {
      if (!byKind.has(kind)) byKind.set(kind, { total: 0, classes: [] });
      const entry = byKind.get(kind);
      entry.total += number;
      const names = truth && found && truth !== found
        ? `${data.classes[truth]} → ${data.classes[found]}` : data.classes[truth || found];
      entry.classes.push(number > 1 ? `${names} × ${number}` : names);
    }
    const items = [...byKind].sort(([a], [b]) => a - b).map(([kind, { total, classes }]) => {
      const [style, word] = data.kinds[kind];
      const few = data.classes.length > 2 && detailed;
      const text = `${total} ${word}${few ? `: ${classes.slice(0, 12).join(", ")}${classes.length > 12 ? ", …" : ""}` : ""}`;
      return make("li", { class: style }, sign(kind), text);
    });
    return make("ul", { class: "counts" }, ...(items.length ? items : [make("li", {}, "nothing in it")]));
  }

  const quality = (image) => (image[QUALITY] < 0 ? "" : `${data.measure} ${(image[QUALITY] / 100).toFixed(2)}`);

  function card(image) {
    const inside = [];
    if (image[PICTURE] >= 0)
      inside.push(make("div", { class: "pair" }, ...data.panels.map(([suffix, caption]) =>
        make("div", { class: "frame" }, picture(image, suffix, caption, true)))));
    const name = make("div", { class: "name" },
      make("span", { title: image[NAME] }, String(image[NAME])), make("span", { class: "soft" }, quality(image)));
    inside.push(name, counts(image, false));
    const link = make("a", { class: image[PICTURE] >= 0 ? "card" : "card row", href: anchor(image) }, ...inside);
    return make("li", { id: `image-${image[ADDRESS]}` }, link);
  }

  // --- The large view ---

  function show(index) {
    const image = shown[index];
    current = index;
    byId("large-name").replaceChildren(String(image[NAME]), " ",
      make("small", {}, `${index + 1} of ${shown.length}${quality(image) && ` · ${quality(image)}`}`));
    const panels = image[PICTURE] >= 0
      ? data.panels.map(([suffix, caption]) =>
          make("figure", {}, make("figcaption", {}, caption), picture(image, suffix, caption, false)))
      : [make("p", { class: "soft" }, `Not drawn: there are pictures of ${data.drawn} images (see --report-images).`)];
    byId("panels").replaceChildren(...panels);
    byId("large-counts").replaceChildren(counts(image, true));
    const file = byId("file"), address = link(image);
    file.hidden = address === null;
    if (address !== null) file.href = address;
    byId("previous").disabled = index === 0;
    byId("next").disabled = index === shown.length - 1;
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
  }

  function go(step) {
    const index = current + step;
    if (index < 0 || index >= shown.length) return;
    history.replaceState(null, "", anchor(shown[index]));
    show(index);
  }

  function followAddress() {
    if (!location.hash.startsWith("#image-")) {
      if (dialog.open) dialog.close();
      return;
    }
    let address;
    try { address = decodeURIComponent(location.hash.slice(7)); } catch { return; }
    const same = (image) => String(image[ADDRESS]) === address;
    let index = shown.findIndex(same);
    if (index < 0 && data.images.some(same)) {
      clear();
      index = shown.findIndex(same);
    }
    if (index >= 0) show(index);
  }

  function clear() {
    Object.assign(filter, { class: 0, kind: -1, pair: null });
    update();
  }

  function choose(change) {
    Object.assign(filter, change);
    update();
    byId("images").scrollIntoView();
  }

  // --- What a person does ---

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const { class: number, kind, pair } = button.dataset;
    if (number !== undefined)
      choose({ class: Number(number) === filter.class ? 0 : Number(number), kind: -1, pair: null });
    else if (pair !== undefined) choose({ class: 0, kind: -1, pair: pair.split(",").map(Number) });
    else if (kind !== undefined) {
      Object.assign(filter, { kind: Number(kind) === filter.kind ? -1 : Number(kind), pair: null });
      update();
    }
  });
  chosenClass.addEventListener("change", () => {
    Object.assign(filter, { class: Number(chosenClass.value), pair: null });
    update();
  });
  order.addEventListener("change", update);
  more.addEventListener("click", () => {
    const first = count;
    showMore();
    list.children[first].firstElementChild.focus({ preventScroll: true });
  });
  byId("reset").addEventListener("click", clear);
  byId("previous").addEventListener("click", () => go(-1));
  byId("next").addEventListener("click", () => go(1));
  byId("close").addEventListener("click", () => dialog.close());
  const marks = byId("marks");
  marks.addEventListener("click", () => {
    const plain = dialog.classList.toggle("plain");
    marks.setAttribute("aria-pressed", String(!plain));
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowLeft") go(-1);
    else if (event.key === "ArrowRight") go(1);
    else if (event.key === "m") marks.click();
    else return;
    event.preventDefault();
  });
  dialog.addEventListener("close", () => {
    const image = shown[current];
    history.replaceState(null, "", location.pathname + location.search);
    while (count <= current && count < shown.length) showMore();
    document.getElementById(`image-${image[ADDRESS]}`)?.firstElementChild.focus();
  });
  window.addEventListener("hashchange", followAddress);

  update();
  followAddress();
})();
