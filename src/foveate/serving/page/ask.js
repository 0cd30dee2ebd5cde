// Questions about the picture: streamed answers, what they were made of, and budgets of tokens against time.

import { chatPieces } from "./api.js";
import { $, copyText, duration, make, percent, plural } from "./dom.js";

const LOOKING = ["boxes", "pictures", "towers"];

export class Ask {
  /** `page` as in Describe; `describe` knows the boxes that were drawn. */
  constructor(stage, describe, page) {
    this.stage = stage;
    this.describe = describe;
    this.page = page;
    this.picture = null;
    this.model = null;
    this.turns = [];
    this.chosen = null;
    this.shown = false;
    this.controller = null;
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.controller) this.controller.abort();
      else this.ask($("question").value.trim());
    });
    $("question").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!this.controller) $("ask").requestSubmit();
      }
    });
    $("question").addEventListener("input", () => this.#refresh());
    $("keep").addEventListener("input", () => this.#sayKeep());
    $("keep").addEventListener("change", () => this.again());
    $("new-talk").addEventListener("click", () => {
      this.clear();
      $("question").focus();
    });
    $("copy-talk").addEventListener("click", async () =>
      page.copied(await copyText(this.json()), "The conversation is copied."),
    );
    this.#sayKeep();
  }

  setPicture(picture) {
    this.clear();
    this.picture = picture;
    this.#refresh();
    $("talk-hint").textContent = picture.questions.length
      ? "For instance:"
      : "In a few words, as you would ask a person.";
    $("ideas").replaceChildren(
      ...picture.questions.map((text) =>
        make("button", { type: "button", class: "idea", on: { click: () => this.ask(text) } }, text),
      ),
    );
  }

  /** The tab is shown or left; what an answer was made of is marked on the picture meanwhile. */
  show(shown) {
    this.shown = shown;
    this.#mark();
  }

  countBoxes(count) {
    const mine = $("objects").querySelector("[value=mine]");
    mine.disabled = count === 0;
    mine.textContent = count ? `my ${plural(count, "box", "boxes")}` : "my boxes";
    if (!count && $("objects").value === "mine") $("objects").value = "found";
  }

  clear() {
    this.controller?.abort();
    this.turns = [];
    this.chosen = null;
    $("talk").replaceChildren();
    this.#refresh();
    this.#showRuns();
    this.#mark();
  }

  json() {
    const turns = this.turns.map(({ question, runs }) => ({
      question,
      runs: runs.map(({ keep, text, looked }) => ({ keep, answer: text, foveate: looked })),
    }));
    return JSON.stringify({ model: this.model?.id, picture: this.picture?.name, turns }, null, 2);
  }

  get keep() {
    return Number($("keep").value) / 100;
  }

  get #objects() {
    return { found: null, mine: this.describe.boxes, none: [] }[$("objects").value];
  }

  #refresh() {
    const ready = this.picture !== null && this.model !== null;
    const talks = this.turns.length > 0;
    $("talk-empty").hidden = talks;
    $("talk-over").hidden = !talks;
    $("question").disabled = !ready;
    $("send").disabled = !this.controller && (!ready || !$("question").value.trim());
    $("send").textContent = this.controller ? "Stop" : "Ask";
  }

  #sayKeep() {
    const text = this.keep < 1 ? percent(this.keep) : "all";
    $("keep-value").textContent = text;
    $("keep").setAttribute("aria-valuetext", this.keep < 1 ? `${text} of the tokens` : "all tokens");
  }

  // ------------------------------------------------------------------ asking

  async ask(question) {
    if (!question || !this.picture || !this.model || this.controller) return;
    if (this.page.tooLarge(this.picture.name, "in a question has", this.picture.dataUrl.length)) return;
    const turn = this.#turn(question);
    this.turns.push(turn);
    $("talk").append(turn.root);
    $("question").value = "";
    this.#choose(turn);
    const answered = await this.#run(turn, () => {
      // The conversation goes on without what had no answer; it is asked as a new question.
      this.ask(question);
    });
    if (!answered && this.turns.includes(turn)) {
      this.turns = this.turns.filter((other) => other !== turn);
      turn.root.remove();
      this.#choose(this.turns.at(-1) ?? null);
      if (!$("question").value) $("question").value = question;
      this.#refresh();
    }
  }

  /** Asks the chosen question again, with the budget as it is now. */
  async again() {
    if (!this.chosen) return;
    if (this.controller) {
      this.wanted = true; // the slider went on; the last budget is asked for when the run before is done
      return;
    }
    do {
      this.wanted = false;
      await this.#run(this.chosen, () => this.again());
    } while (this.wanted && this.chosen);
  }

  /** One run of a turn's question; false where it gave no answer at all. */
  async #run(turn, retry) {
    const controller = (this.controller = new AbortController());
    const run = { keep: this.keep, text: "", looked: null };
    const first = turn.runs.length === 0;
    if (first) turn.answer.dataset.state = "waiting";
    this.#refresh();
    this.page.busy("ask");
    try {
      const body = { messages: this.#messages(turn), boxes: this.#objects };
      if (run.keep < 1) body.keep = run.keep;
      for await (const piece of chatPieces(body, controller.signal)) {
        if (piece.text) {
          run.text += piece.text;
          if (first) {
            turn.answer.dataset.state = "saying";
            turn.answer.textContent = run.text;
          }
        } else run.looked = piece.looked;
      }
      this.page.answered("ask");
      turn.runs.push(run);
      turn.shown = run;
      if (first) turn.answer.textContent = run.text || "(no words)";
      this.page.say(`${first ? "Answer" : `With ${share(run)}`}: ${run.text || "no words"}. ${duration(total(run))}.`);
    } catch (error) {
      if (error.name !== "AbortError") this.page.fail(error, retry);
      else if (first && run.text) {
        turn.runs.push(run); // what was said until it was stopped stays
        turn.shown = run;
      }
    } finally {
      this.controller = null;
      turn.answer.dataset.state = "done";
      this.#refresh();
    }
    if (turn.runs.length) this.#sayMade(turn);
    if (this.chosen === turn) {
      this.#showRuns();
      this.#mark();
    }
    return turn.runs.length > 0;
  }

  #messages(turn) {
    const messages = [];
    for (const earlier of this.turns.slice(0, this.turns.indexOf(turn))) {
      messages.push({ role: "user", content: earlier.question }, { role: "assistant", content: earlier.runs[0].text });
    }
    messages.push({ role: "user", content: turn.question });
    messages[0].content = [
      { type: "text", text: messages[0].content },
      { type: "image_url", image_url: { url: this.picture.dataUrl } },
    ];
    return messages;
  }

  // ------------------------------------------------------------------ the conversation

  #turn(question) {
    const turn = { question, runs: [], shown: null };
    turn.answer = make("p", { class: "answer", "data-state": "waiting" });
    turn.made = make("span", { class: "sub" });
    turn.button = make(
      "button",
      {
        type: "button",
        class: "made",
        "aria-pressed": "false",
        on: { click: () => this.#choose(this.chosen === turn ? null : turn) },
      },
      turn.made,
    );
    turn.root = make("li", { class: "turn" }, make("p", { class: "question" }, question), turn.answer, turn.button);
    return turn;
  }

  #sayMade(turn) {
    const [run] = turn.runs;
    if (!run.looked) {
      turn.made.textContent = "stopped";
      return;
    }
    const objects = run.looked.boxes.length;
    turn.made.textContent = [
      `looked at ${share(run)}`,
      objects ? plural(objects, "object") : "no objects",
      duration(total(run)),
    ].join(" · ");
  }

  #choose(turn) {
    if (this.chosen === turn) return;
    this.chosen = turn;
    for (const own of this.turns) {
      own.root.classList.toggle("chosen", own === turn);
      own.button.setAttribute("aria-pressed", String(own === turn));
    }
    this.#showRuns();
    this.#mark();
  }

  #mark() {
    this.stage.showLooked(this.shown && this.chosen?.shown?.looked ? this.chosen.shown.looked : null);
  }

  // ------------------------------------------------------------------ runs

  #showRuns() {
    const runs = (this.chosen?.runs ?? []).filter((run) => run.looked);
    $("runs").hidden = $("runs-legend").hidden = runs.length === 0;
    if (!runs.length) return;
    $("runs-title").textContent = this.chosen.question;
    const longest = Math.max(...runs.map(total));
    const rows = runs.map((run) => {
      const times = run.looked.milliseconds;
      const show = () => {
        this.chosen.shown = run;
        this.#showRuns();
        this.#mark();
        [...$("runs-rows").querySelectorAll("button")][runs.indexOf(run)]?.focus();
      };
      const pressed = String(this.chosen.shown === run);
      const width = (value) => ({ width: `${(100 * value) / longest}%` });
      return make(
        "tr",
        { class: this.chosen.shown === run ? "shown" : null },
        make(
          "td",
          {},
          make(
            "button",
            { type: "button", class: "quiet", "aria-pressed": pressed, on: { click: show } },
            run.keep < 1 ? percent(run.keep) : "all",
          ),
        ),
        make("td", {}, run.looked.kept ? `${run.looked.kept.kept} of ${run.looked.kept.of}` : "all"),
        make(
          "td",
          { class: "time" },
          make(
            "span",
            { class: "rail", "aria-hidden": "true" },
            make("span", { class: "seeing", vars: width(looking(run)) }),
            make("span", { class: "saying", vars: width(times.answer ?? 0) }),
          ),
          make("span", { class: "value" }, duration(total(run))),
        ),
        make("td", { class: "text" }, run.text),
      );
    });
    $("runs-rows").replaceChildren(...rows);
  }
}

/** Milliseconds that a run's model took, without waiting and loading. */
const looking = ({ looked }) => LOOKING.reduce((sum, stage) => sum + (looked.milliseconds[stage] ?? 0), 0);
const total = (run) => looking(run) + (run.looked.milliseconds.answer ?? 0);

const share = ({ looked }) => (looked.kept ? `${looked.kept.kept} of ${looked.kept.of} tokens` : "all tokens");
