// The page: one prompt, and views of what the model does with it. What is chosen stands in the address, after #.

import { Superseded, ask, modelCard } from "./api.js";
import { drawGrid, drawProbabilities, drawThumbnail, percent, rounded, visible } from "./grid.js";

const $ = (id) => document.getElementById(id);
const TEXTS = ["prompt", "corrupted", "answer", "wrong", "towards", "away", "coefficient", "length"];
let card;
let tokens = [];
let next = [];
let patterns = [];
const chosen = { pos: null, layer: 0, head: 0, heads: new Set(), cell: null, attribute: "" };

// The address

function remember() {
  const state = { pos: chosen.pos, layer: chosen.layer, head: chosen.head, heads: [...chosen.heads], attribute: chosen.attribute };
  for (const name of TEXTS) state[name] = $(name).value;
  state.steerLayer = $("steer-layer").value;
  history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify(state))}`);
}

function recall() {
  if (location.hash.length < 2) return false;
  try {
    const state = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    for (const name of TEXTS) if (typeof state[name] === "string") $(name).value = state[name];
    if (typeof state.steerLayer === "string") $("steer-layer").value = state.steerLayer;
    if (Number.isInteger(state.pos)) chosen.pos = state.pos;
    chosen.layer = Math.min(state.layer ?? 0, card.n_layers - 1);
    chosen.head = Math.min(state.head ?? 0, card.n_heads - 1);
    chosen.heads = new Set((state.heads ?? []).filter((name) => /^\d+,\d+$/.test(name)));
    chosen.attribute = state.attribute ?? "";
    return Boolean($("prompt").value);
  } catch {
    return false;
  }
}

// Asking

function heads() {
  return [...chosen.heads].map((name) => name.split(",").map(Number));
}

function request(more = {}) {
  return { prompt: $("prompt").value, pos: chosen.pos, ...more };
}

async function showing(section, work) {
  const place = $(section);
  place.classList.add("busy");
  try {
    await work();
    return true;
  } catch (error) {
    if (error instanceof Superseded) return false;
    $("error").textContent = error.message;
    return false;
  } finally {
    place.classList.remove("busy");
  }
}

// The prompt and the next token

async function runPrompt() {
  $("error").textContent = "";
  const begun = performance.now();
  const worked = await showing("view-next", async () => {
    const found = await ask("run", request());
    tokens = found.tokens.map((token) => token.text);
    next = found.next;
    if (chosen.pos === null || chosen.pos >= tokens.length) chosen.pos = tokens.length - 1;
    drawTokens();
    drawNext();
  });
  if (!worked) return;
  chosen.attribute = "";
  $("attribute-answer").value = "";
  remember();
  await Promise.all([showLens(), showAttention(), showAttribution(), showAblation()]);
  $("status").textContent = `${tokens.length} tokens, ${Math.round(performance.now() - begun)} ms`;
  forgetCode();
}

function drawTokens() {
  $("tokens").replaceChildren(...tokens.map((text, pos) => {
    const token = document.createElement("div");
    token.className = "token";
    token.textContent = visible(text);
    token.title = `position ${pos}`;
    token.setAttribute("role", "option");
    token.setAttribute("aria-selected", pos === chosen.pos);
    token.tabIndex = pos === chosen.pos ? 0 : -1;
    token.addEventListener("click", () => choosePosition(pos));
    return token;
  }));
}

$("tokens").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  choosePosition(Math.max(0, Math.min(tokens.length - 1, chosen.pos + step)));
});

function choosePosition(pos) {
  chosen.pos = pos;
  for (const [place, token] of [...$("tokens").children].entries()) {
    token.setAttribute("aria-selected", place === pos);
    token.tabIndex = place === pos ? 0 : -1;
  }
  $("tokens").children[pos].focus();
  drawNext();
  chosen.attribute = "";
  $("attribute-answer").value = "";
  remember();
  forgetCode();
  showAttribution();
  showAblation();
}

function drawNext() {
  const rows = next[chosen.pos];
  $("next-caption").textContent = `After position ${chosen.pos}, ${visible(tokens[chosen.pos])}`;
  $("next").replaceChildren(...rows.map((row) => {
    const line = document.createElement("li");
    const [name, bar, share] = ["name", "bar", "share"].map((kind) => {
      const part = document.createElement("span");
      part.className = kind;
      return part;
    });
    name.textContent = visible(row.text);
    bar.style.width = `${100 * row.probability}%`;
    share.textContent = percent(row.probability);
    line.append(name, bar, share);
    return line;
  }));
}

// Views of the prompt

function showLens() {
  return showing("view-lens", async () => {
    const { sites, cells } = await ask("lens", request());
    const rows = sites.map((_, index) => sites.length - 1 - index);
    const say = (row, pos) => {
      const words = cells[rows[row]][pos].map((one) => `${visible(one.text)} ${percent(one.probability)}`);
      return `${sites[rows[row]]}, position ${pos} ${visible(tokens[pos])}: ${words.join(", ")}`;
    };
    drawGrid($("lens"), {
      label: "Logit lens",
      rows: rows.map((index) => sites[index]),
      columns: tokens.map(visible),
      turned: true,
      kind: "word",
      shade: (row, pos) => 0.8 * cells[rows[row]][pos][0].probability,
      text: (row, pos) => visible(cells[rows[row]][pos][0].text),
      say,
      show: (row, pos) => { $("lens-readout").textContent = say(row, pos); },
    });
  });
}

function showAttention() {
  return showing("view-attention", async () => {
    patterns = (await ask("attention", request())).patterns;
    $("heads").style.gridTemplateColumns = `repeat(${card.n_heads}, max-content)`;
    $("heads").replaceChildren(...patterns.flatMap((layer, l) => layer.map((pattern, h) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "head";
      button.setAttribute("aria-pressed", l === chosen.layer && h === chosen.head);
      button.setAttribute("aria-label", `Layer ${l} head ${h}`);
      const canvas = document.createElement("canvas");
      drawThumbnail(canvas, pattern);
      button.append(canvas, `L${l}H${h}`);
      button.addEventListener("click", () => chooseHead(l, h));
      return button;
    })));
    drawPattern();
  });
}

function chooseHead(layer, head) {
  [chosen.layer, chosen.head] = [layer, head];
  for (const [index, button] of [...$("heads").children].entries()) {
    button.setAttribute("aria-pressed", index === layer * card.n_heads + head);
  }
  drawPattern();
  remember();
  forgetCode();
}

function drawPattern() {
  const pattern = patterns[chosen.layer][chosen.head];
  $("head-title").textContent = `Layer ${chosen.layer} head ${chosen.head}`;
  const say = (query, key) =>
    `from ${query} ${visible(tokens[query])} to ${key} ${visible(tokens[key])}: ${(pattern[query][key] / 1000).toFixed(3)}`;
  $("pattern-readout").textContent = "";
  drawGrid($("pattern"), {
    label: `Attention of layer ${chosen.layer} head ${chosen.head}`,
    rows: tokens.map(visible),
    columns: tokens.map(visible),
    turned: true,
    shade: (query, key) => (key > query ? null : (1.6 * pattern[query][key]) / 1000),
    say,
    show: (query, key) => { $("pattern-readout").textContent = say(query, key); },
  });
}

function showAttribution() {
  if (!chosen.attribute) chosen.attribute = next[chosen.pos][0].text;
  if (!card.reads_text && !$("attribute-answer").value) chosen.attribute = String(next[chosen.pos][0].id);
  $("attribute-answer").value = chosen.attribute;
  return showing("view-attribute", async () => {
    const found = await ask("attribute", request({ answer: chosen.attribute }));
    const columns = [...found.heads[0].map((_, head) => (found.by_head ? `H${head}` : "attention")), ...(found.mlps.length ? ["MLP"] : [])];
    const value = (layer, column) => (column < found.heads[0].length ? found.heads[layer][column] : found.mlps[layer]);
    const most = Math.max(...found.heads.flat().map(Math.abs), ...found.mlps.map(Math.abs), 1e-9);
    $("attribute-caption").textContent =
      `The logit of ${visible(found.answer)} after position ${chosen.pos} ${found.before_cap ? ", before the cap," : ""} is ${rounded(found.logit)}. Each cell is what a part adds to it; all parts and the numbers below sum to it.`;
    const say = (layer, column) => `layer ${layer} ${columns[column]}: ${rounded(value(layer, column), 3)}`;
    drawGrid($("attribution"), {
      label: "What each head and MLP adds to the logit",
      rows: found.heads.map((_, layer) => `layer ${layer}`),
      columns,
      kind: "number",
      shade: (layer, column) => value(layer, column) / most,
      text: (layer, column) => rounded(value(layer, column)),
      say,
      show: (layer, column) => { $("attribution-readout").textContent = say(layer, column); },
    });
    $("attribution-others").replaceChildren(...Object.entries(found.others).map(([name, number]) => {
      const line = document.createElement("li");
      line.textContent = `${name}: ${rounded(number)}`;
      return line;
    }));
  });
}

// Ablation

function showAblation() {
  drawGrid($("ablation"), {
    label: "Heads to ablate",
    rows: Array.from({ length: card.n_layers }, (_, layer) => `layer ${layer}`),
    columns: Array.from({ length: card.n_heads }, (_, head) => `H${head}`),
    shade: (layer, head) => (chosen.heads.has(`${layer},${head}`) ? -1 : 0),
    text: (layer, head) => (chosen.heads.has(`${layer},${head}`) ? "off" : ""),
    pressed: (layer, head) => chosen.heads.has(`${layer},${head}`),
    say: (layer, head) => `layer ${layer} head ${head}`,
    act: (layer, head) => {
      const name = `${layer},${head}`;
      if (!chosen.heads.delete(name)) chosen.heads.add(name);
      remember();
      forgetCode();
      showAblation();
      $("ablation").querySelector(`[data-row="${layer}"][data-column="${head}"]`).focus();
    },
  });
  return showing("view-ablate", async () => {
    const { runs, rows } = await ask("ablate", request({ heads: heads() }));
    drawProbabilities($("ablated"), runs, rows);
  });
}

$("ablate-none").addEventListener("click", () => {
  chosen.heads.clear();
  remember();
  forgetCode();
  showAblation();
});

// Patching

function patchFields(more = {}) {
  return request({ corrupted: $("corrupted").value, answer: $("answer").value, wrong: $("wrong").value, ...more });
}

function showPatch() {
  return showing("view-patch", async () => {
    const found = await ask("patch", patchFields());
    $("patched").replaceChildren();
    $("patch-readout").textContent = "";
    $("patch-caption").textContent =
      `Logit difference of the two answers: ${rounded(found.clean)} in the first prompt, ${rounded(found.corrupted)} in the second. A cell is the share of the way that an activation of the first prompt brings the second run: 1 is all of it. Choose a cell to see the probabilities.`;
    const labels = found.tokens.map((token, pos) =>
      token === found.corrupted_tokens[pos] ? visible(token) : `${visible(token)}→${visible(found.corrupted_tokens[pos])}`);
    drawShares("patch-stream", found.stream, labels, "stream", true);
    drawShares("patch-heads", found.heads, found.heads[0].map((_, head) => `H${head}`), "head", false);
  });
}

function drawShares(place, shares, columns, kind, turned) {
  const named = kind === "stream" ? "position" : "head";
  const say = (layer, index) =>
    `layer ${layer}, ${named} ${index}${kind === "stream" ? ` ${columns[index]}` : ""}: ${rounded(100 * shares[layer][index], 0)} % of the way`;
  drawGrid($(place), {
    label: kind === "stream" ? "Patched streams" : "Patched heads",
    rows: shares.map((_, layer) => `layer ${layer}`),
    columns,
    turned,
    kind: "number",
    shade: (layer, index) => shares[layer][index],
    text: (layer, index) => rounded(shares[layer][index]),
    say,
    show: (layer, index) => { $("patch-readout").textContent = say(layer, index); },
    act: (layer, index) => {
      chosen.cell = { kind, layer, index };
      forgetCode();
      showing("view-patch", async () => {
        const { runs, rows } = await ask("patch_cell", patchFields(chosen.cell));
        $("patch-readout").textContent = say(layer, index);
        drawProbabilities($("patched"), runs, rows);
      });
    },
  });
}

// Steering

function steerFields() {
  return request({
    towards: $("towards").value,
    away: $("away").value,
    layer: Number.parseInt($("steer-layer").value, 10),
    coefficient: Number.parseFloat($("coefficient").value),
    length: Number.parseInt($("length").value, 10),
  });
}

function showSteer() {
  return showing("view-steer", async () => {
    const found = await ask("steer", steerFields());
    const joined = (pieces) => pieces.join(card.reads_text ? "" : " ");
    const parts = [["as it is", joined(found.plain)], [`steered, by a vector of norm ${found.norm.toFixed(1)}`, joined(found.steered)]];
    $("steered").replaceChildren(...parts.flatMap(([name, text]) => {
      const term = document.createElement("dt");
      const words = document.createElement("dd");
      term.textContent = name;
      words.textContent = text;
      return [term, words];
    }));
  });
}

// Python

function codeFields(view) {
  const more = {
    attention: { layer: chosen.layer, head: chosen.head },
    attribute: { answer: chosen.attribute },
    ablate: { heads: heads() },
  }[view] ?? {};
  if (view === "patch") return patchFields({ view });
  if (view === "patch_cell") return patchFields({ view, ...(chosen.cell ?? {}) });
  if (view === "steer") return { ...steerFields(), view };
  return request({ view, ...more });
}

async function showCode(details) {
  const place = details.querySelector("pre") ?? details.appendChild(document.createElement("pre"));
  try {
    place.textContent = (await ask("code", codeFields(details.dataset.view))).code;
  } catch (error) {
    if (error instanceof Superseded) return;
    place.textContent = `# ${error.message}`;
  }
  if (!details.querySelector("button")) {
    const copy = document.createElement("button");
    copy.type = "button";
    copy.textContent = "Copy";
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(place.textContent);
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(place);
        copy.textContent = "Selected: press Ctrl-C";
      }
    });
    details.append(copy);
  }
}

// What is open is written anew; the rest when it is opened.
function forgetCode() {
  for (const details of document.querySelectorAll("details.code[open]")) details.open = false;
}

for (const details of document.querySelectorAll("details.code")) {
  details.addEventListener("toggle", () => { if (details.open) showCode(details); });
}

// Forms

const submits = {
  "prompt-form": () => { chosen.pos = null; return runPrompt(); },
  "attribute-form": () => { chosen.attribute = $("attribute-answer").value; remember(); forgetCode(); return showAttribution(); },
  "patch-form": () => { remember(); forgetCode(); return showPatch(); },
  "steer-form": () => { remember(); forgetCode(); return showSteer(); },
};
for (const [form, work] of Object.entries(submits)) {
  $(form).addEventListener("submit", (event) => {
    event.preventDefault();
    $("error").textContent = "";
    work();
  });
}
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("prompt-form").requestSubmit();
});
$("example").addEventListener("change", () => {
  takeExample(card.examples[$("example").selectedIndex]);
  chosen.pos = null;
  runPrompt().then(showPatch);
});

function takeExample(example) {
  if (!example) return;
  for (const name of ["prompt", "corrupted", "answer", "wrong"]) $(name).value = example[name];
  $("towards").value = example.wrong;
  $("away").value = example.answer;
}

async function begin() {
  card = await modelCard();
  document.title = `${card.name} · hooked_lm explorer`;
  $("card").textContent =
    `${card.name}: ${card.n_layers} layers of ${card.n_heads} heads, width ${card.d_model}, ${card.d_vocab.toLocaleString("en")} tokens`;
  $("prompt-rule").textContent = card.reads_text ? `(at most ${card.most_tokens} tokens)` : `(token numbers, at most ${card.most_tokens})`;
  $("steer-layer").max = card.n_layers - 1;
  $("example").replaceChildren(...card.examples.map((example) => new Option(example.title)));
  if (!card.examples.length) $("example").disabled = true;
  if (!recall()) takeExample(card.examples[0]);
  if (!$("prompt").value) $("prompt").value = card.reads_text ? "The" : "0 1 2";
  await runPrompt();
  if ($("corrupted").value) await showPatch();
  document.body.dataset.ready = "true";
}

begin();
