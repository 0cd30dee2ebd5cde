// Regions: those that are drawn and those that are found; what is said of them and what was looked at.

import { regionEvents } from "./api.js";
import { $, copyText, crop, duration, make, percent, plural } from "./dom.js";

const SCORES = [
  ["category_scores", "Category", 3],
  ["attribute_scores", "Attributes", 6],
  ["tag_scores", "Tags", 8],
];
/** The words that the model says of a region, by where their scores are. */
const LIKELY = {
  category_scores: (region) => [region.category],
  attribute_scores: (region) => Object.keys(region.attributes ?? {}),
  tag_scores: (region) => Object.keys(region.tags ?? {}),
};

export class Describe {
  /** `page`: say(text), fail(error, retry), busy(verb) says that its model is being loaded, answered(verb). */
  constructor(stage, page) {
    this.stage = stage;
    this.page = page;
    this.regions = new Map();
    this.picture = null;
    this.finding = null;
    this.next = 1;
    this.model = null;
    this.reading = null; // whose attention is laid over the picture, of every region that is opened
    this.onBoxes = () => {};
    $("everything").addEventListener("click", () => (this.finding ? this.finding.abort() : this.everything()));
    $("add-box").addEventListener("click", () => stage.addInTheMiddle());
    $("clear").addEventListener("click", () => {
      this.clear();
      page.say("All boxes are gone.");
    });
    $("copy-regions").addEventListener("click", async () =>
      page.copied(await copyText(this.json()), "The regions are copied."),
    );
  }

  setPicture(picture) {
    this.clear();
    this.picture = picture;
    this.next = 1;
    this.#refresh();
  }

  /** The boxes that a person drew or chose. */
  get boxes() {
    return [...this.regions.values()].map(({ box }) => box);
  }

  clear() {
    this.finding?.abort();
    this.finding = null;
    for (const region of [...this.regions.values()]) this.#forget(region);
    this.next = 1;
    this.#refresh();
  }

  json() {
    const regions = [...this.regions.values()].filter((own) => own.result).map((own) => bare(own.result));
    const [width, height] = this.stage.size;
    return JSON.stringify({ model: this.model?.id, picture: this.picture?.name, width, height, regions }, null, 2);
  }

  // ------------------------------------------------------------------ boxes

  /** A box was drawn. */
  draw(box) {
    const region = this.#add(box, false);
    this.choose(region.id);
    this.#describe(region);
    return region.id;
  }

  /** A box was moved or sized. */
  change(id, box) {
    const region = this.regions.get(id);
    Object.assign(region, { box, found: false, result: null, look: false });
    this.#describe(region);
  }

  remove(id) {
    const region = this.regions.get(id);
    if (!region) return;
    const left = [...this.regions.keys()].filter((other) => other !== id);
    this.#forget(region);
    this.#refresh();
    this.page.say(`Box ${id} is gone.`);
    const after = left.find((other) => other > id) ?? left.at(-1);
    if (after === undefined) $("add-box").focus();
    else this.stage.focus(after);
  }

  #add(box, found) {
    const region = { id: this.next++, box, found, result: null, look: false, error: null, controller: null, views: [] };
    region.item = this.#item(region);
    this.regions.set(region.id, region);
    $("regions").append(region.item.root);
    this.stage.add(region.id, box);
    this.#refresh();
    return region;
  }

  #forget(region) {
    region.controller?.abort();
    region.item.root.remove();
    this.regions.delete(region.id);
    this.stage.remove(region.id);
    if (this.chosen === region.id) this.chosen = null;
  }

  #refresh() {
    const count = this.regions.size;
    const ready = this.picture !== null && this.model !== null;
    $("regions-empty").hidden = count > 0;
    $("listed").hidden = count === 0;
    $("count").textContent = plural(count, "region");
    $("clear").disabled = count === 0;
    $("add-box").disabled = !ready;
    $("everything").disabled = !ready;
    this.onBoxes(count);
  }

  // ------------------------------------------------------------------ requests

  async #describe(region) {
    if (this.regions.get(region.id) !== region) return; // it went before it was tried again
    region.controller?.abort();
    const controller = (region.controller = new AbortController());
    region.error = null;
    this.stage.told(region.id);
    this.stage.describe(region.id, "", "waiting");
    this.#show(region);
    this.page.busy("describe");
    try {
      const fields = { boxes: [region.box], views: true, attention: true, scores: true };
      for await (const { event, data } of regionEvents("/v1/regions", this.picture.blob, fields, controller.signal)) {
        if (event === "region") {
          Object.assign(region, { result: data, look: true });
          this.#show(region);
        } else if (event === "done") {
          const time = duration(data.milliseconds.work);
          this.page.say(`Box ${region.id}: ${short(region.result)}. ${time}.`);
        }
      }
      this.page.answered("describe");
    } catch (error) {
      if (error.name === "AbortError") return;
      region.error = error;
      this.#show(region);
      this.page.fail(error, () => this.#describe(region));
    }
  }

  async everything() {
    const controller = (this.finding = new AbortController());
    for (const region of [...this.regions.values()]) if (region.found) this.#forget(region);
    this.#refresh();
    $("everything").textContent = "Stop";
    this.page.say("Looking for regions …");
    this.page.busy("describe");
    let count = 0;
    let time = null;
    try {
      const events = regionEvents("/v1/everything", this.picture.blob, { scores: true }, controller.signal);
      for await (const { event, data } of events) {
        if (event === "start") this.page.say(`${plural(data.total, "proposal")} to describe …`);
        else if (event === "region") {
          const region = this.#add(data.box, true);
          region.result = data;
          this.stage.told(region.id);
          this.#show(region);
          count += 1;
        } else if (event === "done") time = data.milliseconds.work;
      }
      this.page.answered("describe");
      this.page.say(
        count ? `${plural(count, "region")} found and described in ${duration(time)}.` : "Nothing was found.",
      );
    } catch (error) {
      if (this.finding !== controller) return; // it was for another picture
      if (error.name === "AbortError") this.page.say(`Stopped after ${plural(count, "region")}.`);
      else this.page.fail(error, () => this.everything());
    } finally {
      if (this.finding === controller) this.finding = null;
      $("everything").textContent = this.finding ? "Stop" : "Everything";
    }
  }

  /** Views and scores of a region that "everything" gave come when they are looked at. */
  async #look(region) {
    if (region.look || !region.result || region.looking || this.regions.get(region.id) !== region) return;
    region.looking = true;
    const controller = (region.controller = new AbortController());
    try {
      const tasks = ["caption", "tags", "attributes", "category"];
      const fields = { boxes: [region.box], views: true, attention: true, tasks };
      for await (const { event, data } of regionEvents("/v1/regions", this.picture.blob, fields, controller.signal)) {
        if (event !== "region" || !region.result) continue;
        region.result = { ...region.result, views: data.views, attention: data.attention };
      }
      region.look = true;
      this.#detail(region);
    } catch (error) {
      if (error.name !== "AbortError") this.page.fail(error, () => this.#look(region));
    } finally {
      region.looking = false;
    }
  }

  // ------------------------------------------------------------------ the list

  /** Chooses a region, or none; its details open. */
  choose(id) {
    const before = this.regions.get(this.chosen);
    this.chosen = this.regions.has(id) ? id : null;
    if (before && before.id !== this.chosen) this.#expand(before, false);
    this.stage.choose(this.chosen);
    const region = this.regions.get(this.chosen);
    if (region) this.#expand(region, true);
  }

  /** Chooses a region and brings its details into view; the keyboard goes there, too, if it is wanted. */
  open(id, focus = false) {
    this.choose(id);
    const region = this.regions.get(id);
    if (!region) return;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    region.item.root.scrollIntoView({ block: "nearest", behavior: still ? "auto" : "smooth" });
    if (focus) region.item.head.focus({ preventScroll: true });
  }

  #item(region) {
    const item = {};
    item.thumb = make("span", { class: "thumb" });
    item.caption = make("span", { class: "caption" });
    item.sub = make("span", { class: "sub" });
    item.detail = make("div", { class: "detail", id: `detail-${region.id}`, hidden: true });
    item.head = make(
      "button",
      {
        type: "button",
        class: "head",
        "aria-expanded": "false",
        "aria-controls": item.detail.id,
        on: { click: () => (this.chosen === region.id ? this.choose(null) : this.choose(region.id)) },
      },
      item.thumb,
      make("span", { class: "said" }, item.caption, item.sub),
      make("span", { class: "number", "aria-hidden": "true" }, String(region.id)),
    );
    item.root = make("li", { class: "region", "data-id": region.id }, item.head, item.detail);
    return item;
  }

  #show(region) {
    const { item, result, error } = region;
    item.root.dataset.state = error ? "failed" : result ? "done" : "waiting";
    item.thumb.replaceChildren(crop(this.stage.image, region.box, 112));
    if (error) {
      item.caption.textContent = "Not described";
      item.sub.textContent = error.message;
      this.stage.describe(region.id, "", "failed");
    } else if (!result) {
      item.caption.textContent = "Being described …";
      item.sub.textContent = "";
    } else {
      item.caption.textContent = short(result);
      const parts = [];
      if (result.category) parts.push(`${result.category} ${percent(result.category_score)}`);
      if (result.caption_score !== undefined) parts.push(`said with ${percent(result.caption_score)}`);
      if (result.score !== undefined) parts.push(`found with ${percent(result.score)}`);
      item.sub.textContent = parts.join(" · ");
      this.stage.describe(region.id, short(result), "done", result.category ?? "");
    }
    if (this.chosen === region.id) this.#expand(region, true);
  }

  #expand(region, open) {
    region.item.head.setAttribute("aria-expanded", String(open));
    region.item.detail.hidden = !open;
    region.item.root.classList.toggle("open", open);
    if (!open) {
      region.item.detail.replaceChildren(); // it is made anew when it is opened, as things stand then
      return;
    }
    this.#detail(region);
    this.#look(region);
  }

  #detail(region) {
    const { result, error } = region;
    const place = region.item.detail;
    if (this.chosen !== region.id) return;
    place.replaceChildren();
    if (error) {
      const again = make("button", { type: "button", on: { click: () => this.#describe(region) } }, "Try again");
      place.append(make("p", {}, error.message), make("div", { class: "actions" }, again));
      return;
    }
    if (result) place.append(this.#views(region), this.#scores(result));
    const actions = make(
      "div",
      { class: "actions" },
      make("span", { class: "place" }, region.box.map((value) => Math.round(value)).join(", ")),
    );
    if (result) {
      const copy = async () =>
        this.page.copied(await copyText(JSON.stringify(bare(result), null, 2)), `Box ${region.id} is copied.`);
      actions.append(this.#action("Copy as JSON", region, copy));
    }
    actions.append(this.#action("Remove", region, () => this.remove(region.id)));
    place.append(actions);
  }

  #action(text, region, click) {
    return make(
      "button",
      { type: "button", class: "quiet", "aria-label": `${text}: box ${region.id}`, on: { click } },
      text,
    );
  }

  #views(region) {
    const { views, attention = [] } = region.result;
    const boxes = views.map(({ box }) => box);
    const read = () => attention.find((own) => reader(own) === this.reading);
    const list = make("div", { class: "views" });
    const point = (index = -1) => {
      const of = read()?.views ?? [];
      this.stage.showViews(boxes, index, of.find(({ box }) => same(box, boxes[index])) ?? of[0]);
    };
    for (const [index, view] of views.entries()) {
      const show = () => point(index);
      const hide = () => this.chosen === region.id && point();
      const reach = view.t === 0 ? "the box" : view.t === 1 ? "all" : `t = ${view.t}`;
      const tasks = view.tasks.join(", ");
      const picture = make("span", { class: "seen" });
      if (view.png) picture.append(make("img", { src: view.png, alt: "" }));
      list.append(
        make(
          "button",
          {
            type: "button",
            class: "view",
            "aria-label": `View ${index + 1}, ${reach}: for ${tasks}`,
            on: { pointerenter: show, pointerleave: hide, focus: show, blur: hide, click: show },
          },
          picture,
          make("b", {}, reach),
          make("span", {}, tasks),
        ),
      );
    }
    const readers = this.#readers(attention, () => {
      for (const [index, { children }] of [...list.children].entries()) {
        children[0].querySelector(".heat")?.remove();
        const heat = read()?.views.find(({ box }) => same(box, boxes[index]));
        if (heat) children[0].append(overlay(heat));
      }
      point();
    });
    return make("section", {}, make("h4", {}, "What it looked at"), list, ...readers);
  }

  /** Buttons that lay attention over the views, and what it says in numbers; `show` lays it. */
  #readers(attention, show) {
    const said = make("p", { class: "hint", "aria-live": "polite" });
    const tell = () => {
      const own = attention.find((one) => reader(one) === this.reading);
      said.textContent = own
        ? `Red where it read: ${percent(1 - own.whole)} in the region, ${percent(own.whole)} in the views as wholes.`
        : "";
      for (const button of buttons) {
        button.setAttribute("aria-pressed", String(own !== undefined && button.dataset.reader === this.reading));
      }
      show();
    };
    const buttons = attention.map((own) => {
      const click = () => {
        this.reading = this.reading === reader(own) ? null : reader(own);
        tell();
      };
      const text = own.word === undefined ? `for ${own.tasks.join(", ")}` : `${own.query}: ${own.word}`;
      return make("button", { type: "button", class: "quiet reader", "data-reader": reader(own), on: { click } }, text);
    });
    tell();
    if (!buttons.length) return [];
    const label = { class: "readers", role: "group", "aria-label": "Show where it read" };
    return [make("div", label, make("span", { "aria-hidden": "true" }, "Where it read"), ...buttons), said];
  }

  #scores(result) {
    const section = make("section", { class: "scores" });
    for (const [name, title, few] of SCORES) {
      if (!result[name]) continue;
      const sorted = Object.entries(result[name]).toSorted((a, b) => b[1] - a[1]);
      const likely = new Set(LIKELY[name](result));
      const list = make("ul", { class: "bars" });
      const fill = (all) =>
        list.replaceChildren(
          ...sorted
            .slice(0, all ? sorted.length : few)
            .map(([word, score]) =>
              make(
                "li",
                { class: likely.has(word) ? "likely" : null },
                make("span", { class: "word" }, word),
                make(
                  "span",
                  { class: "rail", "aria-hidden": "true" },
                  make("span", { vars: { width: `${100 * score}%` } }),
                ),
                make("span", { class: "value" }, percent(score)),
              ),
            ),
        );
      const more = make("button", { type: "button", class: "quiet" });
      const tell = (all) => {
        more.setAttribute("aria-expanded", String(all));
        more.textContent = all ? "Fewer" : `All ${sorted.length}`;
        more.setAttribute("aria-label", `${more.textContent}: ${title.toLowerCase()}`);
        fill(all);
      };
      tell(false);
      more.addEventListener("click", () => tell(more.getAttribute("aria-expanded") === "false"));
      const head = make("div", { class: "over" }, make("h4", {}, title), sorted.length > few ? more : null);
      section.append(make("div", { class: "score" }, head, list));
    }
    return section;
  }
}

/** What is said of a region in one line. */
const short = (region) =>
  region?.caption || region?.category || Object.keys(region?.tags ?? {}).join(", ") || "nothing said";

/** A region without the pictures of its views. */
const bare = (region) => ({
  ...region,
  views: region.views.map(plain),
  attention: region.attention?.map((own) => ({ ...own, views: own.views.map(plain) })),
});
const plain = ({ png, ...view }) => view;

/** Which of a region's attentions one is; other regions have the same. */
const reader = ({ query, tasks }) => `${query} ${tasks.join(" ")}`;
const same = (box, other) => other !== undefined && box.every((value, index) => value === other[index]);

/** Attention over the picture of its view, which is as large as its square allows. */
function overlay({ box, png }) {
  const [width, height] = [box[2] - box[0], box[3] - box[1]];
  const longer = Math.max(width, height);
  const vars = { width: `${(100 * width) / longer}%`, height: `${(100 * height) / longer}%` };
  return make("img", { class: "heat", src: png, alt: "", vars });
}
