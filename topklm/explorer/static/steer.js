// The Steer box: both texts as they come. Without this its form leads to a page with both of them whole.

const FACTORS = { max: "4", step: "0.05", list: "steer-factors", unit: "times its activation", first: "2" };

export function startSteering(box) {
  if (!box) return;
  const form = box.querySelector("form");
  const { prompt, mode, value, positions } = form.elements;
  const slider = box.querySelector("[type=range]");
  const status = box.querySelector("[data-status]");
  const unit = box.querySelector("[data-unit]");
  const buttons = { write: box.querySelector("[data-write]"), stop: box.querySelector("[data-stop]") };
  const highest = Number(slider.dataset.highest);
  const activations = {
    max: slider.max,
    step: slider.step,
    list: "steer-marks",
    unit: unit.textContent,
    first: String(highest),
  };
  const facts = () => mode.selectedOptions[0].dataset; // of the mode, from the page
  const scaleOfMode = () => ("valueIsFactor" in facts() ? FACTORS : activations);
  let scale = scaleOfMode();
  const kept = new Map([[activations, activations.first], [FACTORS, FACTORS.first], [scale, value.value]]);
  let running = null;

  // Strength: a slider and a number that follow each other; 0.7x is times the highest activation.

  const times = () => (scale === FACTORS ? null : /^\s*([+-]?[\d.]+(?:e[+-]?\d+)?)x\s*$/i.exec(value.value));
  const amount = () => (times() ? Number((times()[1] * highest).toPrecision(6)) : Number(value.value));

  function saySlider() {
    const factor = Number((slider.value / highest).toPrecision(2));
    slider.setAttribute("aria-valuetext", scale === FACTORS ? `${slider.value} times` : `${slider.value}, ${factor} times the highest`);
  }
  function fitMode() {
    const next = scaleOfMode();
    if (next !== scale) {
      kept.set(scale, value.value);
      scale = next;
      value.value = kept.get(scale);
    }
    slider.max = scale.max;
    slider.step = scale.step;
    slider.setAttribute("list", scale.list);
    slider.value = amount();
    unit.textContent = scale.unit;
    box.querySelector("[data-marks=activation]").hidden = scale === FACTORS;
    box.querySelector("[data-marks=factor]").hidden = scale !== FACTORS;
    slider.disabled = value.disabled = "withoutValue" in facts();
    saySlider();
  }
  slider.addEventListener("input", () => {
    value.value = slider.value;
    saySlider();
  });
  value.addEventListener("input", () => {
    slider.value = amount();
    saySlider();
  });
  mode.addEventListener("change", fitMode);
  fitMode();

  // Writing

  const say = (text) => {
    if (status.textContent !== text) status.textContent = text; // what is said again is read out again
  };
  const column = (name) => box.querySelector(`[data-column=${name}]`);
  function complain(message) {
    const notice = document.createElement("p");
    notice.className = "notice";
    notice.setAttribute("role", "alert");
    notice.textContent = message;
    box.querySelector("[data-problem]").replaceChildren(notice);
  }
  function take(line) {
    if ("prompt" in line) {
      for (const name of ["unsteered", "steered"]) {
        const begin = document.createElement("span");
        begin.className = "quiet";
        begin.textContent = line.prompt;
        column(name).replaceChildren(begin);
        box.querySelector(`[data-end=${name}]`).textContent = "";
      }
      box.querySelector("[data-texts]").hidden = false;
      box.querySelector("[data-about]").hidden = true;
      say("Writing; the first text takes longer …");
    } else if ("ends" in line) {
      for (const [name, end] of Object.entries(line.ends)) box.querySelector(`[data-end=${name}]`).textContent = end.summary;
      box.querySelector("[data-about]").hidden = false;
      say("Done");
    } else {
      column(line.column).append(line.input_token ? marked(line.text) : line.text);
      say("Writing …");
    }
  }
  async function write() {
    running?.abort();
    const mine = (running = new AbortController());
    const asked = new URLSearchParams(new FormData(form));
    history.replaceState(history.state, "", `${location.pathname}?${asked}#steer`);
    box.querySelector("[data-problem]").replaceChildren();
    say("Waiting for the model …");
    buttons.stop.disabled = false;
    try {
      const answer = await fetch(`/api/neurons/${box.dataset.layer}/${box.dataset.neuron}/steer`, {
        method: "POST",
        body: asked,
        signal: mine.signal,
      });
      if (!answer.ok) {
        say("");
        complain(await reason(answer));
        return;
      }
      let last = {};
      for await (const line of lines(answer.body)) {
        if (mine !== running) return;
        take((last = line));
      }
      if (!("ends" in last)) throw new Error("the answer is not whole");
    } catch {
      if (mine !== running) return;
      say(mine.signal.aborted ? "Stopped" : "");
      if (!mine.signal.aborted) complain("The server broke off: is topklm explore still running?");
    } finally {
      if (mine === running) {
        if (document.activeElement === buttons.stop) buttons.write.focus();
        buttons.stop.disabled = true;
        running = null;
      }
    }
  }
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    write();
  });
  buttons.stop.addEventListener("click", () => running?.abort());

  // For programs

  const one = () => ({
    layer: Number(box.dataset.layer),
    neuron: Number(box.dataset.neuron),
    mode: mode.value,
    value: value.disabled ? 0 : amount(),
    positions: positions.value,
  });
  const formats = {
    python() {
      const { layer, neuron, mode: how, value: strength, positions: where } = one();
      const said = times() && !value.disabled ? JSON.stringify(value.value.trim()) : strength;
      const { max_new_tokens: length, temperature, seed } = form.elements;
      const anywhere = where === "all";
      const steer = anywhere
        ? `{(${layer}, ${neuron}): ${said}}` + ("default" in facts() ? "" : `, steer_mode="${how}"`)
        : `[Intervention(${layer}, ${neuron}, ${said}, "${how}", "${where}")]`;
      const head = anywhere ? "" : "from topklm.inference.interventions import Intervention\n\n";
      const options = `max_new_tokens=${length.value}, temperature=${temperature.value}, seed=${seed.value}`;
      return `${head}model.generate(${JSON.stringify(prompt.value)}, ${options}, steer=${steer})\n`;
    },
    json: () => JSON.stringify({ format: "topklm-interventions", version: 1, interventions: [one()] }, null, 1) + "\n",
  };
  for (const button of box.querySelectorAll("[data-as]")) {
    // Where pages may not write to the clipboard, nothing is offered.
    button.hidden = !navigator.clipboard;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(formats[button.dataset.as]()).then(
        () => say("Copied"),
        () => say("The browser did not allow it"),
      );
    });
  }
}

function marked(text) {
  const mark = document.createElement("mark");
  mark.className = "found";
  mark.textContent = text;
  return mark;
}

async function reason(answer) {
  const text = await answer.text();
  try {
    return JSON.parse(text).error;
  } catch {
    return text.trim().slice(0, 200);
  }
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}
