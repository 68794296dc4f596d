// What is asked: the model, the orders, the options; and what is wrong with them.

const byId = (id) => document.getElementById(id);
const form = byId("form");
const { reads, names: choices } = JSON.parse(byId("known").textContent);
const MOST_ORDERS = 4;
const DEFAULTS = { threshold: 0.9, entropy_bound: 0.1, edit_threshold: 0.2, tokens_per_step: 1 };

const stored = {
  get(name, store = localStorage) {
    try { return JSON.parse(store.getItem(`blockdiff.${name}`)); } catch { return null; }
  },
  set(name, value, store = localStorage) {
    try { store.setItem(`blockdiff.${name}`, JSON.stringify(value)); } catch { /* not allowed */ }
  },
};

let models = [];
let again = 0;
let key = stored.get("key", sessionStorage) ?? "";

const chatting = () => !byId("modes").hidden && form.elements.mode.value === "chat";
const model = () => models.find(({ id }) => id === byId("model").value)?.blockdiff ?? {};

// errors

// Options in `backticks` are called what they are called on the page.
function worded(error) {
  if (error.status === 401) {
    return key ? "The server does not take this API key." : "This server asks for an API key.";
  }
  const text = error.message.replace(/`(\w+)`/g, (_, name) => {
    const field = form.querySelector(`[data-name="${name}"], [name="${name}"]`);
    return `“${field?.closest("label")?.firstChild.textContent.trim() ?? name}”`;
  });
  return text[0].toUpperCase() + text.slice(1);
}

function complain(error) {
  const text = error ? worded(error) : "";
  if (byId("error").textContent !== text) byId("error").textContent = text;
  byId("error").classList.toggle("soft", error?.status === 503); // it will pass
  for (const element of document.querySelectorAll("[aria-invalid]")) {
    element.removeAttribute("aria-invalid");
    element.removeAttribute("aria-describedby");
  }
  if (!error) return;
  byId("key-row").hidden = error.status !== 401 && byId("key-row").hidden;
  if (error.status === 401) byId("key").focus();
  const { param } = error;
  const own = `[data-name="${CSS.escape(param ?? "")}"], [name="${CSS.escape(param ?? "")}"]`;
  const blamed = [...form.querySelectorAll(own)].filter((element) => element.value !== "");
  for (const element of blamed) {
    element.setAttribute("aria-invalid", "true");
    element.setAttribute("aria-describedby", "error");
  }
}

// the models, and the orders they can do

async function loadModels() {
  try {
    const answer = await (await ask("v1/models", key)).json();
    models = answer.data;
  } catch (error) {
    complain(error);
    // A server that has just begun opens its model first.
    clearTimeout(again);
    if (error.status === 503) again = setTimeout(loadModels, 1000 * (error.retryAfter || 2));
    return false;
  }
  complain(null);
  byId("key-row").hidden = true;
  const before = byId("model").value || stored.get("settings")?.model;
  byId("model").replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === before)));
  useModel();
  return true;
}

function useModel() {
  const told = orders();
  byId("modes").hidden = !model().chat;
  byId("orders").replaceChildren();
  for (const order of told.length ? told : (stored.get("settings")?.orders ?? [{}])) addOrder(order);
  changeMode();
}

function options(select, pairs, value) {
  select.replaceChildren(...pairs.map(([id, text]) => new Option(text, id)));
  select.value = pairs.some(([id]) => id === String(value ?? "")) ? String(value ?? "") : "";
}

function addOrder(told = {}) {
  const { samplers = [], block_sizes: sizes = [], default_sampler: usual } = model();
  const item = byId("order").content.cloneNode(true).firstElementChild;
  const [sampler, size] = item.querySelectorAll("select");
  const own = usual ? `model's (${usual})` : "the model's";
  options(sampler, [["", own], ...samplers.map((name) => [name, name])], told.sampler);
  options(size, [["", "model's"], ...sizes.map((n) => [String(n), String(n)])], told.block_size);
  sampler.addEventListener("change", () => showSettings(item));
  item.querySelector(".remove").addEventListener("click", () => {
    const next = item.nextElementSibling ?? item.previousElementSibling;
    item.remove();
    numberOrders();
    save();
    next?.querySelector("select").focus();
  });
  byId("orders").append(item);
  showSettings(item, told);
  numberOrders();
}

function showSettings(item, told = {}) {
  const name = item.querySelector("select").value;
  const fields = (reads[name] ?? []).toReversed().map((setting) => {
    const label = document.createElement("label");
    const words = setting.replaceAll("_", " ");
    label.append(`${words[0].toUpperCase()}${words.slice(1)} `);
    let field;
    if (choices[setting]) {
      field = document.createElement("select");
      options(field, [["", "as usual"], ...choices[setting].map((one) => [one, one])], told[setting]);
    } else {
      field = document.createElement("input");
      Object.assign(field, { type: "number", min: 0, step: "any", value: told[setting] ?? "" });
      field.placeholder = DEFAULTS[setting] ?? "";
    }
    field.dataset.name = setting;
    label.append(field);
    return label;
  });
  const settings = item.querySelector(".settings");
  settings.replaceChildren(settings.firstElementChild, ...fields);
}

function numberOrders() {
  const items = [...byId("orders").children];
  items.forEach((item, i) => {
    item.querySelector("legend").textContent = items.length > 1 ? `Order ${i + 1}` : "Order";
    item.querySelector(".remove").hidden = items.length === 1;
    item.querySelector(".remove").setAttribute("aria-label", `Remove order ${i + 1}`);
  });
  byId("add").hidden = items.length >= MOST_ORDERS;
  byId("alone-row").hidden = items.length === 1;
}

function orders() {
  return [...byId("orders").children].map((item) => {
    const fields = [...item.querySelectorAll("[data-name]")].filter(({ value }) => value !== "");
    return Object.fromEntries(fields.map((field) => [field.dataset.name, value(field)]));
  });
}

const named = (name) => form.elements[name];
const value = (field) =>
  field.type === "number" || field.dataset.name === "block_size" ? Number(field.value) : field.value;

function changeMode() {
  const chat = chatting();
  byId("system-row").hidden = !chat;
  byId("forget").hidden = !chat;
  byId("prompt-label").textContent = chat ? "Message" : "Prompt";
  byId("hint").querySelector("kbd").hidden = chat; // Enter alone sends a message
}

// What all orders of one request have in common; `before`: what was said before the message.
function common(before) {
  const body = { model: byId("model").value };
  for (const name of ["max_tokens", "temperature", "top_p", "seed"]) {
    if (named(name).value !== "") body[name] = value(named(name));
  }
  body.seed ??= Math.floor(Math.random() * 2 ** 31);
  const stop = named("stop").value.split("\n").filter(Boolean);
  if (stop.length) body.stop = stop.map((text) => text.replaceAll("\\n", "\n"));
  if (!chatting()) return { ...body, prompt: byId("prompt").value };
  const system = byId("system").value;
  const first = system ? [{ role: "system", content: system }] : [];
  const message = { role: "user", content: byId("prompt").value };
  return { ...body, messages: [...first, ...before, message] };
}

function nameOf(order, all) {
  const { sampler = model().default_sampler ?? "model's", ...settings } = order;
  const said = (setting) => `${setting.replaceAll("_", " ")} ${settings[setting]}`;
  const others = Object.keys(settings).filter((setting) => setting !== sampler);
  const name = [sampler in settings ? said(sampler) : sampler, ...others.map(said)].join(", ");
  const same = all.filter((one) => JSON.stringify(one) === JSON.stringify(order));
  return same.length > 1 ? `${name} (${all.indexOf(order) + 1})` : name;
}

// what is remembered

const PLAIN = ["model", "mode", "system", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop"];

function save() {
  if (!models.length) return;
  const settings = Object.fromEntries(PLAIN.map((name) => [name, named(name).value]));
  stored.set("settings", { ...settings, alone: named("alone").checked, orders: orders() });
}

function restore() {
  const settings = stored.get("settings") ?? {};
  for (const name of PLAIN) if (settings[name] !== undefined) named(name).value = settings[name];
  named("alone").checked = settings.alone ?? false;
}
