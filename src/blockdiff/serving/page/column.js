// How one text looks after so many evaluations.

const UNKNOWN = "mask"; // drawn as wide as this until the token is known
const NAMES = { waiting: "waiting", writing: "writing", cancelled: "cancelled", failed: "failed" };

function fill(element, text) {
  const [, space, word] = text.match(/^(\s*)([^]*)$/);
  const core = document.createElement("span");
  core.className = "core";
  core.textContent = word || space;
  if (!core.textContent || core.textContent.includes("\n")) core.classList.add("unseen");
  if (core.textContent.startsWith("\n")) core.classList.add("line-break");
  element.replaceChildren(...(word ? [space, core] : [core]));
}

const rounded = (number) => (number < 10 ? number.toFixed(2) : String(Math.round(number)));

class Column {
  constructor(run, prompt) {
    this.run = run;
    this.root = document.getElementById("column").content.cloneNode(true).firstElementChild;
    this.find = (selector) => this.root.querySelector(selector);
    this.find("h2").textContent = run.name;
    this.find(".copy").setAttribute("aria-label", `Copy the text of ${run.name}`);
    this.find(".copy").addEventListener("click", () => this.copy());
    this.text = this.find(".text");
    const asked = document.createElement("span");
    asked.className = "prompt";
    asked.textContent = prompt;
    this.text.append(asked);
    this.blocks = [];
    this.tokens = []; // elements, with what they show now
    this.told = "";
  }

  async copy() {
    const text = this.find(".whole").textContent;
    const button = this.find(".copy");
    await navigator.clipboard.writeText(text).then(
      () => { button.textContent = "Copied"; },
      () => { button.textContent = "Not allowed"; },
    );
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  // Blocks begin at the multiples of their size, of prompt and text, less an offset.
  block(position) {
    const { prompt_tokens: before, block_size: size, offset = 0 } = this.run.start;
    return Math.floor((before + position + offset) / size);
  }

  blockEnd(index) {
    const { prompt_tokens: before, block_size: size, offset = 0 } = this.run.start;
    return (index + 1) * size - before - offset;
  }

  token(position) {
    for (let next = this.tokens.length; next <= position; next += 1) {
      const index = this.block(next) - this.block(0);
      if (!this.blocks[index]) {
        this.blocks[index] = document.createElement("span");
        this.text.append(this.blocks[index]);
      }
      const element = document.createElement("span");
      this.blocks[index].append(element);
      this.tokens.push({ element, shown: null });
    }
    return this.tokens[position];
  }

  // `nfe`: evaluations; `past`: whether the text is looked at as a whole, nothing in it fresh.
  draw(nfe, past, longest) {
    const { run } = this;
    if (run.start) this.drawText(run.stepsBy(nfe), nfe, past);
    this.drawMap(run.stepsBy(nfe), longest);
    this.drawFacts(nfe);
  }

  drawText(steps, nfe, past) {
    const { run } = this;
    const known = run.written.length;
    const length = run.done ? run.length : run.start.max_tokens;
    const whole = run.done !== null && steps === run.steps.length;
    let open = 0;
    while (open < length && run.at(open, steps)) open += 1;
    const current = whole ? -1 : this.block(Math.min(open, length - 1));
    const end = whole ? known : Math.min(this.blockEnd(current), Math.max(length, known));
    this.token(Math.max(known, end) - 1);
    this.tokens.forEach((token, position) => {
      const now = run.at(position, steps);
      const text = now?.[1] ?? run.written[position]?.at(-1)?.[1] ?? UNKNOWN;
      const names = ["token"];
      if (position >= end) names.push("hidden");
      else if (!now) names.push(position < length || !whole ? "masked" : "hidden");
      else {
        if (!past && run.steps[now[0] - 1].nfe === nfe) names.push("fresh");
        if (now[2]) names.push("edited");
      }
      if (!run.written[position]?.length) names.push("unknown");
      if (run.behind >= 0 && position >= run.behind && position < length) names.push("special");
      if (whole && position >= length) names.push("past-end");
      this.show(token, text, names.join(" "));
    });
    this.blocks.forEach((block, i) => {
      const index = this.block(0) + i;
      const names = [current < 0 || index <= current ? "started" : "", index === current && "active"];
      const name = ["block", ...names].filter(Boolean).join(" ");
      if (block.className !== name) block.className = name;
    });
    this.text.classList.toggle("blocks", run.start.block_size > 1);
  }

  show(token, text, names) {
    if (token.shown !== text) fill(token.element, text);
    token.shown = text;
    if (token.element.className !== names) token.element.className = names;
  }

  // A dot for each token: evaluations from left to right, positions from top to bottom.
  drawMap(steps, longest) {
    const rows = Math.max(this.run.written.length, this.run.start?.max_tokens ?? 1);
    const height = this.run.done ? Math.max(this.run.written.length, 1) : rows;
    this.find(".map").setAttribute("viewBox", `0 -0.5 ${Math.max(longest, 1)} ${height}`);
    const dots = (from, to, edited) =>
      this.run.steps
        .slice(from, to)
        .flatMap((step) =>
          step.at
            .filter((p) => edited === undefined || step.edited.includes(p) === edited)
            .map((position) => `M${step.nfe} ${position}h0`),
        )
        .join("");
    this.find(".ahead").setAttribute("d", dots(steps));
    this.find(".past").setAttribute("d", dots(0, steps, false));
    this.find(".rewritten").setAttribute("d", dots(0, steps, true));
  }

  drawFacts(nfe) {
    const { run } = this;
    const evaluations = Math.min(nfe, run.evaluations);
    const last = run.steps[run.stepsBy(nfe) - 1];
    const whole = run.done && evaluations === run.evaluations;
    const count = whole ? run.length : Math.min(last?.count ?? 0, run.length);
    const perSecond = whole ? run.done.tokens_per_second : last && count / last.seconds;
    this.tell("nfe", evaluations, run.done && run.evaluations);
    this.tell("tokens", count, run.done ? run.length : run.start?.max_tokens);
    this.find('[data-name="rate"]').textContent = evaluations ? rounded(count / evaluations) : "–";
    this.find('[data-name="speed"]').textContent = perSecond > 0 ? rounded(perSecond) : "–";
    const ended = { stop: "ended by itself", length: "full length" };
    const reason = run.done?.finish_reason;
    const state = run.done ? (ended[reason] ?? reason) : NAMES[run.state];
    this.find(".state").textContent = state;
    this.root.dataset.state = run.state;
    const { start, done } = run;
    const facts = start ? [`L′ = ${start.block_size}`, `seed ${start.seed}`] : [];
    if (start) facts.push(`${start.prompt_tokens} prompt tokens`);
    if (done) facts.push(`${rounded(done.seconds)}\u00a0s`);
    this.find(".facts").textContent = run.error ? worded(run.error) : facts.join(" · ");
    this.find(".copy").hidden = run.going || !run.steps.length;
    if (!run.going && !this.told) {
      this.told = done ? done.text : run.written.map((all) => all.at(-1)?.[1] ?? " … ").join("");
      this.find(".whole").textContent = this.told;
    }
  }

  tell(name, value, total) {
    const rest = document.createElement("span");
    rest.textContent = total ? ` of ${total}` : "";
    this.find(`[data-name="${name}"]`).replaceChildren(String(value), rest);
  }
}
