// The page of `icl serve`: ask a program, see its answer and why, correct it, compare it with another.
//
// - It knows the server by its HTTP API only, at addresses relative to its own.
// - Texts of users, data and models become text nodes, never markup.
// - What was asked stands in the address (#program=...&text=...), so that an answer can be linked.

const SHOWN = 10; // labels, before "more"
const KEY = "icl-key";

const find = (selector, root = document) => root.querySelector(selector);
const ask = find("#ask");
const keyForm = find("#key");

let programs = [];
let panels = [];
let running = new AbortController();

// ---------------------------------------------------------------- numbers and elements

const count = (n) => n.toLocaleString("en");
const counted = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;
const seconds = (s) => `${s.toFixed(3)}\u00a0s`;
const percent = (p) => `${p > 0 && p < 0.0005 ? "<0.1" : (100 * p).toFixed(1)}\u00a0%`;
/** What was said: a label with its probability, or a generated text. */
const named = ({ label, probability }) => (probability == null ? `“${label}”` : `${label} ${percent(probability)}`);
/** A message of the server as a sentence. */
const sentence = (said) => said.charAt(0).toUpperCase() + said.slice(1).replace(/([^.!?])$/, "$1.");

/** An element with properties; children are elements or texts. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A label, isolated from the direction of what is around it; a line may break after each "_". */
function labelled(label) {
  const parts = label.split(/(?<=_)/).flatMap((part) => [part, element("wbr")]);
  return element("bdi", { className: "label" }, ...parts.slice(0, -1));
}

/** Show `message` in a paragraph, or hide the paragraph if there is none. */
function tell(paragraph, message) {
  paragraph.textContent = message ?? "";
  paragraph.hidden = !message;
}

// ---------------------------------------------------------------- the server

/** The answer to a request; an error is one sentence that can be shown. */
async function request(path, { body, ...options } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Error(`The server could not be asked (${error.message}). Is it running?`);
  }
  if (response.ok) return response;
  const message = await response.json().then((said) => said.error.message, () => null);
  const wait = response.headers.get("Retry-After");
  const said = message ?? `The server answered ${response.status} ${response.statusText}`.trim();
  if (response.status === 401) askForKey(key ? sentence(said) : "This server asks for a key.");
  const again = wait && !said.includes("again in") ? ` Try again in ${wait} s.` : "";
  throw new Error(sentence(said) + again);
}

const json = async (path, options) => (await request(path, options)).json();

/** The objects of a stream of server-sent events, up to its [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer broke off: the server ended it early.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(sentence(event.error.message));
      yield event;
    }
  }
}

function askForKey(reason) {
  find("#key-reason").textContent = reason;
  if (keyForm.hidden) {
    keyForm.hidden = false;
    keyForm.elements.key.focus();
  }
}

// ---------------------------------------------------------------- one program's answer

class Panel {
  constructor(program, number) {
    this.program = program;
    this.root = find("#panel").content.cloneNode(true).firstElementChild;
    this.form = find("form", this.root);
    this.generates = program.task === "generation";
    if (this.generates) {
      find("label span", this.form).textContent = "Right answer";
      find(".what", this.root).textContent = "Answer";
    } else {
      this.form.elements.label.placeholder = `one of ${count(program.labels.length)}: type a part of it`;
    }
    find("h2", this.root).textContent = program.id;
    find("datalist", this.root).id = `labels-${number}`;
    this.form.elements.label.setAttribute("list", `labels-${number}`);
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.correct(this.form.elements.label.value);
    });
    const more = find(".more", this.root);
    more.addEventListener("click", () => this.fold(more.getAttribute("aria-expanded") === "true"));
  }

  /** Answer and explanation of a text: independent, so that either shows if the other fails. */
  async run(text, signal) {
    if (text !== this.text) {
      find(".corrections", this.root).replaceChildren();
      this.form.elements.label.value = "";
    }
    this.text = text;
    this.said = null;
    this.facts = {};
    this.root.setAttribute("aria-busy", "true");
    const answer = this.generates ? this.generate(text, signal) : this.classify(text, signal);
    await Promise.all([
      this.part(answer, signal, ".answer > .error", [".said", ".labels", ".more", ".correct"]),
      this.part(this.explain(text, signal), signal, ".why > .error", [".explained"]),
    ]);
    for (const label of this.root.querySelectorAll(".shots .label")) {
      label.classList.toggle("same", label.textContent === this.said?.label);
    }
  }

  /** Wait for one part; if it fails, say so in its place and hide what it would have replaced. */
  async part(work, signal, place, replaced) {
    try {
      await work;
      tell(find(place, this.root), null);
    } catch (caught) {
      // A stream that is cut off in the middle does not give the reason in all browsers.
      const error = signal.aborted ? signal.reason : caught;
      if (error.name === "AbortError") return; // the next question is being asked
      for (const old of replaced) find(old, this.root).hidden = true;
      tell(find(place, this.root), error.message);
    }
  }

  async classify(text, signal) {
    const answer = await json("v1/classify", { body: { model: this.program.id, input: text }, signal });
    [this.said] = answer.data;
    this.showLabels(this.said);
    this.showCost(answer);
    this.form.hidden = false;
  }

  async generate(text, signal) {
    const place = find(".generated", this.root);
    place.textContent = "";
    place.hidden = false;
    const body = { model: this.program.id, prompt: text, stream: true, stream_options: { include_usage: true } };
    for await (const event of events(await request("v1/completions", { body, signal }))) {
      place.append(event.choices?.[0]?.text ?? "");
      this.showCost(event);
    }
    this.said = { label: place.textContent.trim() };
    this.form.hidden = false;
  }

  async explain(text, signal) {
    const said = await json("v1/explain", { body: { model: this.program.id, input: text }, signal });
    const place = find(".explained", this.root);
    const shots = said.shots.length;
    find("h3", place).textContent = shots ? `${counted(shots, "shot")}, in the order of the prompt` : "No shots";
    find(".notes", place).replaceChildren(...said.notes.map((note) => element("li", {}, note)));
    find(".shots", place).hidden = !shots;
    find(".shots tbody", place).replaceChildren(...said.shots.map(shotRow));
    find("pre", place).replaceChildren(...taken(said.prompt, said.shots, text));
    place.hidden = false;
    find(".version", this.root).textContent = `version ${said.version}`;
    this.showFacts({ "prompt tokens": `${count(said.tokens)} of ${count(said.budget)}` });
  }

  showLabels(result) {
    const best = find(".said", this.root);
    best.replaceChildren(labelled(result.label), " ", percent(result.probability));
    best.hidden = false;
    const rows = result.labels.map(labelRow);
    const [first, rest] = this.root.querySelectorAll(".labels tbody");
    first.replaceChildren(...rows.slice(0, SHOWN));
    rest.replaceChildren(...rows.slice(SHOWN));
    const other = labelRow({ label: "other", probability: result.other });
    find("th", other).append(element("small", {}, " not any label"));
    find(".labels tfoot", this.root).replaceChildren(other);
    find(".labels", this.root).hidden = false;
    this.fold(true);
    const labels = new Set([...result.labels.map(({ label }) => label), ...(this.program.labels ?? [])]);
    find("datalist", this.root).replaceChildren(...[...labels].map((label) => element("option", { value: label })));
  }

  fold(folded) {
    const rest = this.root.querySelectorAll(".labels tbody")[1];
    const more = find(".more", this.root);
    rest.hidden = folded;
    more.hidden = !rest.rows.length;
    more.textContent = folded ? `${rest.rows.length} more` : "fewer";
    more.setAttribute("aria-expanded", String(!folded));
  }

  showCost({ usage, timing }) {
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      const computed = usage.computed_tokens ?? usage.prompt_tokens - cached;
      this.showFacts({ computed: count(computed), "from cache": count(cached) });
    }
    for (const stage of timing ? ["retrieve", "queue", "model", "total"] : []) {
      if (timing[`${stage}_s`] != null) this.showFacts({ [stage]: seconds(timing[`${stage}_s`]) });
    }
  }

  showFacts(facts) {
    Object.assign(this.facts, facts);
    const order = ["prompt tokens", "computed", "from cache", "retrieve", "queue", "model", "total"];
    const known = order.filter((name) => name in this.facts);
    const made = known.map((name) => element("div", {}, element("dt", {}, name), element("dd", {}, this.facts[name])));
    find(".facts", this.root).replaceChildren(...made);
  }

  /** Send the right label of the text that was asked, show what came back, and ask again. */
  async correct(label) {
    await this.change(async () => {
      const kept = await json("v1/feedback", { body: { model: this.program.id, input: this.text, label } });
      const said = `Correction ${kept.id} is kept: “${kept.label}”. The pool has ${counted(kept.pool_rows, "example")}.`;
      const undo = element("button", { className: "quiet", type: "button" }, "Undo");
      const place = element("div", {}, element("p", {}, said), element("ul", {}, ...kept.flags.map(flagItem)), undo);
      undo.addEventListener("click", () => this.undo(kept, place));
      find(".corrections", this.root).prepend(place);
      this.form.elements.label.value = "";
      return place;
    });
  }

  async undo(kept, place) {
    await this.change(async () => {
      await json(`v1/feedback/${kept.id}`, { method: "DELETE" });
      place.replaceChildren(element("p", {}, `Correction ${kept.id} is undone.`));
      return place;
    });
  }

  /** Change the pool, ask again, and say below the place of the change what that did. */
  async change(act) {
    const error = find(".error", this.form);
    const buttons = [...this.form.querySelectorAll("button")];
    const { text, said: before } = this;
    for (const button of buttons) button.disabled = true;
    try {
      const place = await act();
      tell(error, null);
      await Promise.all([run(text), recount()]);
      if (!before || !this.said) return;
      const effect = element("p", { className: "effect" }, `Before: ${named(before)}. Now: ${named(this.said)}.`);
      place.insertBefore(effect, find("button", place));
    } catch (problem) {
      tell(error, problem.message);
    } finally {
      for (const button of buttons) button.disabled = false;
    }
  }
}

function labelRow({ label, probability, at_most: most }) {
  const bar = element("span", { className: "bar" });
  bar.style.setProperty("--share", probability);
  const range = most == null ? percent(probability) : `${percent(probability)} to ${percent(most)}`;
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, labelled(label)),
    element("td", { ariaHidden: "true" }, bar),
    element("td", { className: "number", title: String(probability) }, range),
  );
}

function shotRow(shot, i) {
  const number = (name, text) => {
    const cell = element("td", { className: "number" }, text);
    cell.dataset.name = name;
    return cell;
  };
  const why = element("small", {}, `${shot.why}; row\u00a0${count(shot.row)}`);
  return element(
    "tr",
    {},
    element("td", { className: "number position" }, String(i + 1)),
    element("td", { className: "text" }, element("bdi", {}, shot.text), why),
    element("td", { className: "of" }, labelled(shot.label)),
    number("score", shot.score.toFixed(3)),
    number("rank", count(shot.rank)),
    number("tokens", count(shot.tokens)),
  );
}

function flagItem({ kind, text, label, similarity }) {
  const near = `(similarity ${similarity.toFixed(2)})`;
  const what = {
    duplicate: "Already in the pool",
    near_duplicate: `Nearly the same as an example of the pool ${near}`,
    contradiction: `Contradicts an example of the pool ${near}`,
  };
  return element("li", { className: kind }, `${what[kind] ?? kind}: `, element("q", {}, text), " is ", labelled(label));
}

/** The prompt in pieces: the texts of shots and the query are marked where they stand in it. */
function taken(prompt, shots, query) {
  const pieces = [];
  let at = 0;
  const mark = (text, className, start) => {
    if (start < at) return;
    pieces.push(prompt.slice(at, start), element("mark", { className }, text));
    at = start + text.length;
  };
  const flat = (text) => text.trim().split(/\s+/).join(" ");
  for (const shot of shots) mark(flat(shot.text), "shot", prompt.indexOf(flat(shot.text), at));
  mark(flat(query), "query", prompt.lastIndexOf(flat(query)));
  return [...pieces, prompt.slice(at)];
}

// ---------------------------------------------------------------- the form

const byName = (name) => programs.find((program) => program.id === name);

function chosen() {
  const names = [ask.elements.program.value, ask.elements.compare.value];
  return names.map(byName).filter((program, i, all) => program && all.indexOf(program) === i);
}

function describe() {
  const [program] = chosen();
  if (!program) return;
  const { labels, pool_rows: rows, base_model: model, task } = program;
  const kind = task === "generation" ? "text to text" : counted(labels.length, "label");
  find("#about").textContent = `${kind}, ${counted(rows, "example")}, on ${model}`;
  for (const option of ask.elements.compare.options) option.disabled = option.value === program.id;
  if (ask.elements.compare.value === program.id) ask.elements.compare.value = "";
}

/** Learn how many examples the programs have now. */
async function recount() {
  for (const program of (await json("v1/models")).data) Object.assign(byName(program.id) ?? {}, program);
  describe();
}

/** Say what was answered, and mark the answers of two programs if they are not the same. */
function compareAnswers() {
  const said = panels.map((panel) => panel.said).filter(Boolean);
  const differ = said.length === 2 && said[0].label !== said[1].label;
  for (const panel of panels) panel.root.classList.toggle("differs", differ);
  const answers = said.map(named).join(" and ");
  const agreement = differ ? "The programs differ: " : said.length === 2 ? "The programs agree: " : "";
  find("#status").textContent = said.length ? agreement + answers : "No answer.";
}

/** Ask the chosen programs for the text of the form. */
function submit() {
  const wanted = chosen();
  const text = ask.elements.text.value;
  if (!wanted.length || !text) return;
  if (panels.length !== wanted.length || panels.some((panel, i) => panel.program !== wanted[i])) {
    panels = wanted.map((program, i) => new Panel(program, i));
    find("#panels").replaceChildren(...panels.map((panel) => panel.root));
  }
  const [program, compare] = wanted.map(({ id }) => id);
  history.replaceState(null, "", `#${new URLSearchParams({ program, ...(compare && { compare }), text })}`);
  run(text);
}

/** Ask the programs that are shown; a question that is being asked gives way. */
async function run(text) {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  find("#status").textContent = "Asking …";
  find("#stop").hidden = false;
  await Promise.all(panels.map((panel) => panel.run(text, signal)));
  if (signal !== running.signal) return;
  find("#stop").hidden = true;
  for (const panel of panels) panel.root.removeAttribute("aria-busy");
  compareAnswers();
}

/** Fill the form from the address, and ask if it holds a text. */
function restore() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const [program, compare, text] = ["program", "compare", "text"].map((name) => asked.get(name) ?? "");
  if (program && !byName(program)) return tell(find("#trouble"), `This server has no program “${program}”.`);
  if (program) ask.elements.program.value = program;
  ask.elements.compare.value = byName(compare) ? compare : "";
  describe();
  if (!text) return;
  ask.elements.text.value = text;
  submit();
}

async function start() {
  const trouble = find("#trouble");
  try {
    programs = (await json("v1/models")).data;
    tell(trouble, programs.length ? null : "This server has no program.");
    ask.hidden = !programs.length;
    const options = () => programs.map(({ id }) => element("option", { value: id }, id));
    ask.elements.program.replaceChildren(...options());
    ask.elements.compare.replaceChildren(element("option", { value: "" }, "nothing"), ...options());
    find("#comparing").hidden = programs.length < 2;
    restore();
  } catch (error) {
    tell(trouble, keyForm.hidden ? error.message : null);
  }
}

ask.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
ask.elements.text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  ask.requestSubmit();
});
ask.elements.program.addEventListener("change", describe);
find("#stop").addEventListener("click", () => running.abort(new Error("Stopped.")));
keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, keyForm.elements.key.value.trim());
  keyForm.hidden = true;
  if (programs.length) submit();
  else start();
});
addEventListener("hashchange", restore);
start();
