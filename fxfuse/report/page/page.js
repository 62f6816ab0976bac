"use strict";
// Tells about what the pointer or the keyboard is at. Names are only ever set as text, never as markup.

const tip = document.getElementById("tip");

function tell(text, box) {
  tip.textContent = text;
  tip.hidden = false;
  const gap = 10;
  const left = Math.min(Math.max(box.left, 4), innerWidth - tip.offsetWidth - 4);
  const below = box.bottom + gap + tip.offsetHeight <= innerHeight;
  const above = box.top - gap - tip.offsetHeight;
  tip.style.left = `${Math.max(left, 4)}px`;
  tip.style.top = `${below || above < 0 ? box.bottom + gap : above}px`;
}

function hush() {
  tip.hidden = true;
}

// Marks: of each set, one can be reached with the Tab key, and arrow keys go on from there.
const markAt = (event) => event.target.closest("[data-marks] [data-mark]");
const tellMark = (mark) => tell(mark.getAttribute("aria-label"), mark.getBoundingClientRect());

for (const set of document.querySelectorAll("[data-marks]")) {
  set.querySelector("[data-mark]")?.setAttribute("tabindex", "0");
}

document.addEventListener("pointerover", (event) => {
  const mark = markAt(event);
  if (mark) tellMark(mark);
  else if (!event.target.closest("#matrix")) hush();
});

document.addEventListener("focusin", (event) => {
  const mark = markAt(event);
  if (!mark) return;
  const set = mark.closest("[data-marks]");
  set.querySelector("[data-mark][tabindex='0']")?.setAttribute("tabindex", "-1");
  mark.setAttribute("tabindex", "0");
  tellMark(mark);
});

document.addEventListener("focusout", hush);

const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hush();
  const mark = markAt(event);
  if (!mark) return;
  const marks = [...mark.closest("[data-marks]").querySelectorAll("[data-mark]")];
  const ends = { Home: 0, End: marks.length - 1 };
  const next = ends[event.key] ?? marks.indexOf(mark) + (STEPS[event.key] ?? NaN);
  if (marks[next]) {
    event.preventDefault();
    marks[next].focus();
  }
});

// The matrix: one picture, so a cell is found by its place.
const matrix = document.getElementById("matrix");
const cells = document.getElementById("cells");
const cursor = document.getElementById("cursor");
const data = JSON.parse(document.getElementById("distances").textContent);
const size = data.names.length;
let row = 0;
let column = 1;

const shown = (value) => (value === null ? "not measured" : String(value));

function tellCell() {
  const at = row * size - (row * (row + 1)) / 2 + column - row - 1;
  cursor.setAttribute("d", `M${column} ${row}h1v1h-1z`);
  tell(
    `dropped: ${data.names[row]}\nmeasured: ${data.names[column]}\n` +
      `cosine distance: mean ${shown(data.mean[at])}, p99 ${shown(data.p99[at])}, max ${shown(data.max[at])}`,
    cursor.getBoundingClientRect(),
  );
}

function leaveCell() {
  cursor.setAttribute("d", "");
  hush();
}

function pointAt(event) {
  const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(cells.getScreenCTM().inverse());
  const [i, j] = [Math.floor(place.y), Math.floor(place.x)];
  if (i < 0 || j <= i || j >= size) return leaveCell();
  [row, column] = [i, j];
  tellCell();
}

if (size > 1) {
  matrix.addEventListener("pointermove", pointAt);
  matrix.addEventListener("pointerdown", pointAt);
  matrix.addEventListener("pointerleave", leaveCell);
  matrix.addEventListener("focus", () => matrix.matches(":focus-visible") && tellCell());
  matrix.addEventListener("blur", leaveCell);
  matrix.addEventListener("keydown", (event) => {
    if (!(event.key in STEPS)) return;
    event.preventDefault();
    const step = STEPS[event.key];
    const vertical = event.key === "ArrowUp" || event.key === "ArrowDown";
    const [i, j] = vertical ? [row + step, column] : [row, column + step];
    if (i >= 0 && i < j && j < size) [row, column] = [i, j];
    tellCell();
  });
}
