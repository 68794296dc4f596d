// What the reader does: writes, cancels, replays.

let runs = [];
let columns = [];
let said = []; // the conversation so far
let sent = ""; // the message that was asked last

const going = () => runs.some((run) => run.going);

// writing

async function write() {
  if (going()) return;
  complain(null);
  if (!models.length && !(await loadModels())) return;
  save();
  pause();
  showConversation();
  const body = common(said);
  const chat = chatting();
  sent = chat ? byId("prompt").value : "";
  byId("asked").textContent = sent;
  byId("asked").hidden = !chat;
  const told = orders();
  runs = told.map((order) => new Run({ ...body, ...order }, nameOf(order, told)));
  columns = runs.map((run) => new Column(run, chat ? "" : body.prompt));
  byId("columns").replaceChildren(...columns.map(({ root }) => root));
  byId("columns").classList.toggle("several", columns.length > 1);
  byId("empty").hidden = true;
  byId("controls").hidden = false;
  byId("cancel").disabled = false;
  follow = true;
  byId("columns").scrollIntoView({ block: "nearest" });
  byId("status").textContent = "Writing.";
  const mine = runs;
  const reading = [];
  for (const run of mine) {
    reading.push(run.read(key, draw));
    if (named("alone").checked) await reading.at(-1);
  }
  await Promise.all(reading);
  if (runs === mine) finish(chat); // else it has been thrown away
}

function finish(chat) {
  byId("cancel").disabled = true;
  draw();
  const told = runs.map((run) => {
    const { usage } = run.done ?? {};
    return usage
      ? `${run.name}: ${usage.completion_tokens} tokens in ${usage.evaluations} evaluations`
      : `${run.name}: ${run.state}`;
  });
  const bad = runs.find((run) => run.error);
  if (bad) complain(bad.error);
  const all = runs.every((run) => run.done) ? "Done" : "Ended";
  byId("status").textContent = `${all}. ${told.join(". ")}.`;
  if (chat && runs[0].done) {
    byId("prompt").value = "";
    said.push({ role: "user", content: sent });
    said.push({ role: "assistant", content: runs[0].done.text });
  }
}

function cancel() {
  runs.forEach((run) => run.cancel());
  draw();
}

// What was said before the message whose answers stand in the columns.
function showConversation() {
  const turns = said.map(({ role, content }) => {
    const item = document.createElement("li");
    item.className = role;
    const who = document.createElement("strong");
    who.textContent = role === "user" ? "You" : "Model";
    const text = document.createElement("p");
    text.textContent = content;
    item.append(who, text);
    return item;
  });
  byId("talk").replaceChildren(...turns);
  byId("talk").hidden = !turns.length || !chatting();
}

function forget() {
  cancel();
  said = [];
  runs = [];
  columns = [];
  byId("columns").replaceChildren();
  for (const id of ["talk", "asked", "controls"]) byId(id).hidden = true;
  byId("empty").hidden = false;
  byId("prompt").focus();
}

// the replay: one evaluation of all texts at a time

let follow = true; // shows what there is, as it comes
let place = 0; // otherwise the evaluation that is shown
let timer = 0;
let drawing = 0;

const last = () => Math.max(0, ...runs.map((run) => run.evaluations));

function draw() {
  drawing ||= requestAnimationFrame(() => {
    drawing = 0;
    drawNow();
  });
}

function drawNow() {
  const longest = last();
  if (follow) place = longest;
  columns.forEach((column) => {
    const { run } = column;
    // Those that are compared need not be equally far while they come.
    column.draw(follow ? run.evaluations : place, follow && !run.going, longest);
  });
  const slider = byId("slider");
  slider.max = longest;
  slider.value = place;
  slider.style.setProperty("--done", `${longest ? (100 * place) / longest : 0}%`);
  const told = `evaluation ${place} of ${longest}`;
  const tokens = runs.map((run) => run.steps[run.stepsBy(place) - 1]?.count ?? 0);
  slider.setAttribute("aria-valuetext", `${told}, ${tokens.join(" and ")} tokens fixed`);
  byId("place").textContent = told;
  const [label, shape] = timer
    ? ["Pause", "M6 4h4v16H6zM14 4h4v16h-4z"]
    : ["Play", "M7 4v16l13-8z"];
  byId("play").setAttribute("aria-label", label);
  byId("icon").setAttribute("d", shape);
}

function goTo(wanted) {
  place = Math.min(Math.max(wanted, 0), last());
  follow = going() && place === last();
  draw();
}

function tick() {
  goTo(place + 1);
  if (place >= last() && !going()) pause();
  else timer = setTimeout(tick, interval());
}

// About half a minute for the whole text, within what the eye can follow.
function interval() {
  return Math.min(Math.max(30000 / Math.max(last(), 1), 50), 300) / Number(byId("speed").value);
}

function play() {
  goTo(place >= last() ? 0 : place);
  timer = setTimeout(tick, interval());
}

function pause() {
  clearTimeout(timer);
  timer = 0;
  draw();
}

function toggle() {
  if (timer) pause();
  else play();
}

// keys and buttons

form.addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
form.addEventListener("change", save);
form.addEventListener("change", (event) => {
  if (event.target.name === "mode") changeMode();
});
byId("model").addEventListener("change", useModel);
byId("add").addEventListener("click", () => {
  const used = orders().map(({ sampler }) => sampler ?? model().default_sampler);
  addOrder({ sampler: model().samplers?.find((name) => !used.includes(name)) });
  save();
  byId("orders").lastElementChild.querySelector("select").focus();
});
byId("cancel").addEventListener("click", cancel);
byId("forget").addEventListener("click", forget);
byId("use-key").addEventListener("click", () => {
  key = byId("key").value;
  stored.set("key", key, sessionStorage);
  loadModels();
});
byId("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  byId("use-key").click();
});
byId("prompt").addEventListener("keydown", (event) => {
  const sends = event.ctrlKey || event.metaKey || (chatting() && !event.shiftKey);
  if (event.key !== "Enter" || !sends || event.isComposing) return;
  event.preventDefault();
  write();
});
byId("slider").addEventListener("input", (event) => {
  pause();
  goTo(Number(event.target.value));
});
byId("play").addEventListener("click", toggle);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && going()) cancel();
  if (event.ctrlKey || event.metaKey || event.altKey || !runs.length) return;
  if (event.target.closest("input:not([type=range]), select, textarea")) return;
  if (event.key === " " && !event.target.closest("button, summary")) {
    event.preventDefault();
    toggle();
  }
  const target = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: last() }[event.key];
  if (target === undefined) return;
  event.preventDefault();
  pause();
  goTo(target);
});

function paint(theme) {
  document.documentElement.style.colorScheme = theme || "light dark";
}
byId("theme").value = stored.get("theme") ?? "";
paint(byId("theme").value);
byId("theme").addEventListener("change", (event) => {
  stored.set("theme", event.target.value);
  paint(event.target.value);
});

// Where there is no room beside the text, the options are out of the way.
if (matchMedia("(max-width: 860px)").matches) document.querySelector(".options").open = false;
restore();
loadModels();
