// Dragging over the map of all neurons filters the table by both values; a click beside the points ends that.

const map = document.querySelector(".map .plot");
const SVG = "http://www.w3.org/2000/svg";
let from = null;
let box = null;

const frame = () => map.dataset.frame.split(" ").map(Number); // left, top, width, height
const range = (axis) => map.dataset[axis].split(" ").map(Number);

// Where the pointer is, in units of the drawing, within the axes.
function at(event) {
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(map.getScreenCTM().inverse());
  const [left, top, width, height] = frame();
  return {
    x: Math.min(Math.max(point.x, left), left + width),
    y: Math.min(Math.max(point.y, top), top + height),
  };
}

function draw(a, b) {
  if (!box) {
    box = document.createElementNS(SVG, "rect");
    box.setAttribute("class", "brush");
    map.append(box);
  }
  const sides = { x: Math.min(a.x, b.x), y: Math.min(a.y, b.y), width: Math.abs(a.x - b.x), height: Math.abs(a.y - b.y) };
  for (const [name, value] of Object.entries(sides)) box.setAttribute(name, value);
  for (const point of map.querySelectorAll(".point")) {
    const [x, y] = [point.cx.baseVal.value - sides.x, point.cy.baseVal.value - sides.y];
    point.classList.toggle("out", x < 0 || y < 0 || x > sides.width || y > sides.height);
  }
}

function clear() {
  box?.remove();
  box = null;
  for (const point of map.querySelectorAll(".out")) point.classList.remove("out");
}

// Writes the bounds into the form of the table, which then asks for it.
function filter(a, b) {
  const [left, top, width, height] = frame();
  const form = document.querySelector("form.filters");
  const bound = (axis, share) => {
    const [low, high] = range(axis);
    return (low + (high - low) * share).toPrecision(4);
  };
  const set = (axis, first, last) => {
    const name = map.dataset[`${axis}Name`];
    form.elements[`${name}.min`].value = first === null ? "" : bound(axis, first);
    form.elements[`${name}.max`].value = last === null ? "" : bound(axis, last);
  };
  const [xs, ys] = [[a?.x, b?.x], [a?.y, b?.y]].map((pair) => pair.sort((one, other) => one - other));
  set("x", a && (xs[0] - left) / width, a && (xs[1] - left) / width);
  set("y", a && 1 - (ys[1] - top) / height, a && 1 - (ys[0] - top) / height);
  document.querySelector("[data-brushed]").hidden = !a;
  form.requestSubmit();
}

map?.addEventListener("pointerdown", (event) => {
  if (event.button || event.target.closest("[data-address]") || event.pointerType === "touch") return;
  event.preventDefault();
  from = at(event);
  map.setPointerCapture(event.pointerId);
});
map?.addEventListener("pointermove", (event) => from && draw(from, at(event)));
map?.addEventListener("pointerup", (event) => {
  if (!from) return;
  const [begin, end] = [from, at(event)];
  from = null;
  if (Math.abs(begin.x - end.x) > 4 && Math.abs(begin.y - end.y) > 4) return filter(begin, end);
  const had = box && box.getAttribute("width") > 4;
  clear();
  if (had || document.querySelector(`[name="${map.dataset.xName}.min"]`).value) filter(null, null);
});
