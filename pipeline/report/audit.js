// What the page does beyond being read: sort, page, copy, show pictures of a group, make a list of what was selected.
// Everything is there without it. Text is only ever set as text; the page's policy forbids anything else.
"use strict";

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);
const number = (n) => n.toLocaleString("en");

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// Pages: of `items()`, in their order, so many at a time.

const pagers = [];

function paged(container, items, size, after) {
  if (items().length <= size) return { show() {} };
  let first = 0;
  const where = make("span", { role: "status" });
  const step = (label, by) => make("button", { type: "button", textContent: label, onclick: () => show(first + by * size) });
  const [back, on] = [step("← Back", -1), step("More →", 1)];
  const pager = make("div", { className: "pager" }, back, where, on);
  pager.setAttribute("role", "group");
  pager.setAttribute("aria-label", "pages");
  after.after(pager);

  function show(at) {
    const list = items();
    first = Math.min(Math.max(0, at), Math.floor((list.length - 1) / size) * size);
    list.forEach((item, i) => { item.hidden = i < first || i >= first + size; });
    where.textContent = `${number(first + 1)}–${number(Math.min(first + size, list.length))} of ${number(list.length)}`;
    back.disabled = first === 0;
    on.disabled = first + size >= list.length;
  }

  show(0);
  pagers.push({ container, reveal: (item) => show(Math.floor(items().indexOf(item) / size) * size) });
  return { show };
}

// Tables

function value(row, column) {
  const cell = row.cells[column];
  if ("value" in cell.dataset) return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  if (cell.classList.contains("number")) return Number(cell.textContent);
  return cell.textContent === "–" ? null : cell.textContent;
}

function compare(a, b) {
  return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
}

function sortable(table) {
  const body = table.tBodies[0];
  const pages = paged(table, () => [...body.rows], Number(table.dataset.paged), table.closest(".scroll"));
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = make("button", { type: "button", textContent: head.textContent });
    head.replaceChildren(button);
    button.onclick = () => {
      const now = head.ariaSort;
      const up = now ? now === "descending" : !head.classList.contains("number"); // numbers: the largest first
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => ({ row, key: value(row, column) }));
      rows.sort((a, b) => {
        if (a.key === null || b.key === null) return (a.key === null) - (b.key === null); // what is not known comes last
        return up ? compare(a.key, b.key) : compare(b.key, a.key);
      });
      body.append(...rows.map(({ row }) => row));
      pages.show(0);
    };
  });
}

all("table.sortable").forEach(sortable);
all("ul[data-paged]").forEach((list) => paged(list, () => [...list.children], Number(list.dataset.paged), list));

// A link to what is on another page, or folded away, opens it.

function reveal() {
  const target = byId(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (const { container, reveal } of pagers) if (target.parentElement === container) reveal(target);
  target.closest("details")?.setAttribute("open", "");
  target.scrollIntoView();
}
window.addEventListener("hashchange", reveal);
if (location.hash) reveal();

// The others of a pair's group: their pictures stand in for their names.

all("details.why").forEach((details) => details.addEventListener("toggle", () => {
  for (const link of all(".alike a:not(:has(img))", details)) {
    const picture = all(":scope > img", byId(link.hash.slice(1)))[0]; // its own, not one of those alike to it
    if (!picture) continue;
    const copy = picture.cloneNode();
    copy.alt = link.textContent;
    link.title = link.textContent;
    link.replaceChildren(copy);
  }
}));

// Commands can be copied.

all(".command").forEach((command) => {
  const text = command.querySelector("code");
  const button = make("button", { type: "button", className: "copy", textContent: "Copy" });
  button.setAttribute("aria-label", `Copy the ${command.querySelector("pre").getAttribute("aria-label")}`);
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch { // not allowed here: the reader copies what is selected
      getSelection().selectAllChildren(text);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };
  command.append(button);
});

// The removal list

let parsed; // megabytes, which nobody waits for before they are wanted
const listOf = (name) => (parsed ??= JSON.parse(byId("lists").textContent))[name];
const commands = JSON.parse(byId("commands").textContent);
const chosen = new Set();

function uids(name) {
  const bytes = atob(listOf(name).listed);
  const found = [];
  for (let at = 0; at < bytes.length; at += 16) {
    let uid = "";
    for (let i = at; i < at + 16; i++) uid += bytes.charCodeAt(i).toString(16).padStart(2, "0");
    found.push(uid);
  }
  return found;
}

function quoted(text) { // for a shell
  return `"${text.replace(/[\\"$`]/g, "\\$&")}"`;
}

// As `unwanted` in filters/listed.py: all pairs of lists that keep none; of the others the greatest uids first, each as
// long as no group of any list would have too few left.

function removal() {
  const findings = new Map(); // uid -> names
  const forced = new Set();
  const groupsOf = new Map(); // uid -> numbers of its groups
  const [left, keeps] = [[], []];
  for (const name of chosen) {
    const { listed, sizes, keep } = listOf(name);
    if (listed === null) continue;
    const found = uids(name);
    for (const uid of found) findings.set(uid, [...(findings.get(uid) ?? []), name]);
    if (!keep) {
      for (const uid of found) forced.add(uid);
      continue;
    }
    let at = 0;
    for (const size of sizes) {
      for (const end = at + size; at < end; at++) groupsOf.set(found[at], [...(groupsOf.get(found[at]) ?? []), left.length]);
      left.push(size);
      keeps.push(keep);
    }
  }
  const remove = (uid) => { for (const group of groupsOf.get(uid) ?? []) left[group]--; };
  forced.forEach(remove);
  for (const uid of [...groupsOf.keys()].filter((uid) => !forced.has(uid)).sort().reverse()) {
    if (groupsOf.get(uid).every((group) => left[group] > keeps[group])) remove(uid);
    else findings.delete(uid);
  }
  return findings;
}

function commandOf(listed, apart) {
  const lists = apart.map(listOf);
  if (listed) lists.unshift({ file: `'${commands.file}'`, keep: 0 });
  const several = (values) => (values.length > 1 ? `(${values.join(", ")})` : values[0]);
  const keep = lists.some((one) => one.keep) || lists.length > 1 ? `, keep=${several(lists.map((one) => one.keep))}` : "";
  const detector = `listed(file=${several(lists.map((one) => one.file))}${keep})`;
  const policy = `threshold(detector='${commands.folder}:listed', above=0.5)`;
  const line = " \\\n    --";
  return `${commands.score}${line}detector ${quoted(detector)} &&\n${commands.filter}${line}scores ${commands.path}${line}policy ${quoted(policy)}`;
}

function choose() {
  const apart = [...chosen].filter((name) => listOf(name).listed === null);
  const listed = removal().size;
  const told = [`${number(chosen.size)} finding${chosen.size > 1 ? "s" : ""}`];
  if (listed) told.push(`${number(listed)} pair${listed > 1 ? "s" : ""} on the list`);
  if (apart.length) told.push(`${apart.length} more list${apart.length > 1 ? "s" : ""}`);
  const says = told.join(", ");
  byId("picked").textContent = chosen.size ? `${says}.` : "Nothing is selected.";
  byId("apart").hidden = !apart.length;
  byId("apart").textContent = `Too many for this page, and read from their files by the command: ${apart.join(", ")}.`;
  byId("made").hidden = !chosen.size;
  byId("download").parentElement.hidden = !listed;
  byId("made").querySelector("code").textContent = chosen.size ? commandOf(listed, apart) : "";
  byId("selected").hidden = !chosen.size;
  byId("selected").querySelector("span").textContent = says;
}

if (all("[data-pick]").length) {
  byId("removal").hidden = false;
  all(".pick").forEach((label) => { label.hidden = false; });
  document.querySelector(".contents").classList.add("selectable");
  all("[data-pick]").forEach((box) => box.addEventListener("change", () => {
    const name = box.dataset.pick;
    if (box.checked) chosen.add(name); else chosen.delete(name);
    all("[data-pick]").forEach((other) => { if (other.dataset.pick === name) other.checked = box.checked; });
    choose();
  }));
  byId("download").onclick = () => {
    const rows = [...removal()].sort(([a], [b]) => (a < b ? -1 : 1)).map(([uid, names]) => `${uid},${names.join(" ")}\n`);
    const link = make("a", { href: URL.createObjectURL(new Blob(["uid,findings\n", ...rows], { type: "text/csv" })), download: commands.file });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  };
}
