"use strict";

// Everything is in the page without this script. What it adds: a cursor among the steps, the states at the cursor,
// filters, and keys that fold the operations.

class Run {
  constructor(article) {
    this.article = article;
    this.steps = [...article.querySelectorAll("li.step")];
    const data = JSON.parse(article.querySelector("script[type='application/json']").textContent);
    this.first = data.first;
    this.changes = data.changes;
    this.blamed = new Set(data.blamed);
    this.cells = new Map([...article.querySelectorAll("[data-cell]")].map((cell) => [cell.dataset.cell, cell]));
    this.at = this.steps.length;
    this.marked = [];
    this.listen();
    article.querySelector(".controls").hidden = false;
    this.show(this.at);
  }

  listen() {
    for (const button of this.article.querySelectorAll("[data-move]")) {
      button.addEventListener("click", () => this.move(button.dataset.move));
    }
    for (const input of this.article.querySelectorAll(".controls input, .controls select")) {
      input.addEventListener("change", () => this.filter());
    }
    this.article.querySelector("[data-fold]").addEventListener("click", () => this.fold([...this.operations()]));
    this.article.querySelector(".steps").addEventListener("click", (event) => {
      const step = event.target.closest("li.step");
      if (step && !event.target.closest("summary, pre, .because a") && !getSelection().toString()) {
        event.preventDefault();
        this.go(this.steps.indexOf(step) + 1);
      }
    });
  }

  operations() {
    return this.article.querySelectorAll(".operation > details");
  }

  // All of them closed, unless all are: then open.
  fold(operations) {
    const open = operations.some((operation) => operation.open);
    for (const operation of operations) operation.open = !open;
    this.show(this.at);
  }

  // The operation that hides a step because it is folded.
  folded(step) {
    return step?.closest(".operation > details:not([open])") ?? null;
  }

  // Step 0 is the state before the first.
  state(number) {
    const state = {...this.first};
    for (const change of this.changes.slice(0, number)) Object.assign(state, change);
    return state;
  }

  show(number) {
    for (const marked of this.marked) marked.classList.remove("here");
    this.steps[this.at - 1]?.removeAttribute("aria-current");
    this.at = number;
    const step = this.steps[number - 1];
    this.marked = [step, this.folded(step)?.querySelector("summary")].filter(Boolean);
    for (const marked of this.marked) marked.classList.add("here");
    step?.setAttribute("aria-current", "step");
    const taken = Math.min(number, this.changes.length);
    const state = this.state(taken);
    const changed = number === taken ? this.changes[number - 1] ?? {} : {};
    const last = this.changes.length === this.steps.length && number === this.steps.length;
    for (const [name, cell] of this.cells) {
      if (cell.textContent !== state[name]) cell.textContent = state[name];
      cell.classList.toggle("is-changed", name in changed);
      cell.classList.toggle("blamed", last && this.blamed.has(name));
    }
    const when = number ? `after step ${taken}` : "at first";
    this.article.querySelector(".when").textContent = number === taken ? when : `${when}, the last that was taken again`;
    const means = this.article.querySelector(".means");
    if (means) means.textContent = step?.querySelector(".call code").title ?? "";
    this.article.querySelector(".where").textContent = number ? `step ${number} of ${this.steps.length}` : "at first";
  }

  go(number) {
    this.show(number);
    const step = this.steps[number - 1];
    const link = step ? `#${step.id}` : `#${this.article.id}`;
    history.replaceState(null, "", link);
    (this.folded(step) ?? step ?? this.article).scrollIntoView({block: "nearest"});
  }

  // Whether keys stop at a step: one that is seen, and of a folded operation the last that would be.
  stops(number) {
    const step = this.steps[number - 1];
    let after = this.folded(step) && step.nextElementSibling;
    while (after?.hidden) after = after.nextElementSibling;
    return !step.hidden && !after;
  }

  move(how) {
    const end = this.steps.length;
    const by = {next: 1, previous: -1, last: -1}[how];
    let at = {first: 0, last: end + 1}[how] ?? this.at;
    if (by) do at += by; while (at > 0 && at <= end && !this.stops(at));
    this.go(at > end ? this.at : Math.max(at, 0));
  }

  filter() {
    const lanes = new Set([...this.article.querySelectorAll("input[data-lane]:checked")].map((box) => box.dataset.lane));
    const about = this.article.querySelector("select[data-about]")?.value ?? "";
    for (const step of this.steps) {
      const wanted = lanes.has(step.dataset.lane) && (!about || step.dataset.about.split(" ").includes(about));
      step.hidden = !wanted;
    }
    for (const operation of this.article.querySelectorAll(".operation")) {
      operation.hidden = !operation.querySelector("li.step:not([hidden])");
    }
  }
}

// Rows of a survey: a search in their text, and what is to be seen of them.
class Finder {
  constructor(controls) {
    this.controls = controls;
    this.items = [...document.querySelectorAll("tr.item")].map((row) => [row, row.textContent.toLowerCase()]);
    this.groups = [...document.querySelectorAll("details.group")].map((group) => [group, group.open]);
    controls.hidden = false;
    controls.addEventListener("input", () => this.find());
    this.find();
  }

  find() {
    const words = this.controls.querySelector("[data-search]").value.toLowerCase().split(/\s+/).filter(Boolean);
    const state = this.controls.querySelector("[data-state]").value;
    let found = 0;
    for (const [row, text] of this.items) {
      row.hidden = !words.every((word) => text.includes(word)) || (state && !row.dataset.states.split(" ").includes(state));
      found += !row.hidden;
    }
    for (const [group, open] of this.groups) {
      group.hidden = !group.querySelector("tr.item:not([hidden])");
      group.open = words.length || state ? true : open;
    }
    this.controls.querySelector(".where").textContent = `${found} of ${this.items.length}`;
  }
}

const runs = new Map();

// The run that keys move in: the one that the address names, or the only one there is.
function current() {
  const named = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const article = named?.closest("article.run") ?? (document.querySelectorAll("article.run").length === 1
    ? document.querySelector("article.run") : null);
  if (!article?.querySelector("li.step")) return null;
  if (!runs.has(article)) runs.set(article, new Run(article));
  return runs.get(article);
}

function follow() {
  const run = current();
  for (const article of document.querySelectorAll("article.run")) article.classList.toggle("open", article === run?.article);
  const at = run?.steps.findIndex((step) => `#${step.id}` === decodeURIComponent(location.hash)) ?? -1;
  if (at >= 0) {
    const folded = run.folded(run.steps[at]);
    if (folded) folded.open = true;
    run.show(at + 1);
  }
}

const KEYS = {j: "next", ArrowDown: "next", k: "previous", ArrowUp: "previous", Home: "first", End: "last"};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input, select, textarea")) return;
  const run = event.key in KEYS || "fF".includes(event.key) ? current() : null;
  if (!run) return;
  event.preventDefault();
  if (event.key in KEYS) return run.move(KEYS[event.key]);
  const here = run.steps[run.at - 1]?.closest(".operation > details");
  const operations = event.key === "F" ? [...run.operations()] : here ? [here] : [];
  run.fold(operations);
});

for (const controls of document.querySelectorAll(".finder")) new Finder(controls);
addEventListener("hashchange", follow);
follow();
