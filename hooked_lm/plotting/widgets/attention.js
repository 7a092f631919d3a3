// What one points at, what is held by a click, and what is shown of them.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const keys = data.tokens.length, queries = data.queries, first = keys - queries;
  const bytes = Uint8Array.from(atob(data.patterns), (letter) => letter.charCodeAt(0));
  const parts = new DataView(bytes.buffer);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const heads = all(".head"), tokens = all(".token"), sides = all(".switch button");
  const name = document.querySelector(".name"), said = document.querySelector(".said");
  const pattern = document.querySelector(".pattern"), large = pattern.querySelector("img"), row = pattern.querySelector(".row");
  // The head and the token pointed at, and those held, which go before them.
  const at = { head: data.start, token: null }, held = { head: null, token: null };
  let side = "destination";

  const shown = (kind) => held[kind] ?? at[kind];
  const attention = (head, query, key) =>
    query < first ? 0 : parts.getUint16(2 * ((head * queries + query - first) * keys + key), true) / data.parts;

  // One number for each token: its part in the attention from the token shown, or to it; without one, what it receives.
  const values = (head, token) =>
    data.tokens.map((_, other) => {
      if (token !== null) return side === "destination" ? attention(head, token, other) : attention(head, other, token);
      let sum = 0;
      for (let query = first; query < keys; query++) sum += attention(head, query, other);
      return sum / queries;
    });

  const channels = (colour) => [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
  const colour = (share) => {
    const above = Math.max(1, data.scale.findIndex(([place]) => place >= share));
    const [[low, from], [high, to]] = [data.scale[above - 1], data.scale[above]];
    const end = channels(to);
    return channels(from).map((start, at) => Math.round(start + ((end[at] - start) * (share - low)) / (high - low)));
  };

  const sentence = (token, numbers) => {
    const best = numbers.map((_, place) => place).sort((a, b) => numbers[b] - numbers[a]).slice(0, 4);
    const list = best.filter((place) => numbers[place] >= 0.005)
      .map((place) => `${place} ${data.tokens[place]} ${numbers[place].toFixed(3)}`).join(",  ");
    if (token === null) return `Point at a token. Received on average: ${list || "nothing"}`;
    const here = `${token} ${data.tokens[token]}`;
    if (side === "source") return `${here} is attended to by ${list || "none"}`;
    return token < first ? `${here} is no query here` : `${here} attends to ${list || "nothing"}`;
  };

  const draw = () => {
    const head = shown("head"), token = shown("token"), numbers = values(head, token);
    heads.forEach((button, place) => {
      button.classList.toggle("on", place === head);
      button.setAttribute("aria-pressed", place === held.head);
    });
    tokens.forEach((span, place) => {
      const mixed = colour(numbers[place]);
      span.style.background = `rgb(${mixed})`;
      span.style.color = numbers[place] >= data.white_from ? "#ffffff" : "#000000";
      span.classList.toggle("on", place === token);
      span.setAttribute("aria-pressed", place === held.token);
      span.dataset.value = numbers[place].toFixed(4);
    });
    sides.forEach((button) => button.setAttribute("aria-pressed", button.dataset.side === side));
    name.textContent = data.names[head];
    name.classList.toggle("held", held.head !== null);
    said.textContent = sentence(token, numbers);
    large.src = heads[head].querySelector("img").src;
    const across = side === "destination", place = across ? token - first : token;
    row.style.display = token === null || place < 0 ? "none" : "block";
    row.classList.toggle("held", held.token !== null);
    const length = 100 / (across ? queries : keys);
    row.style.inset = across
      ? `${place * length}% 0 ${100 - (place + 1) * length}% 0`
      : `0 ${100 - (place + 1) * length}% 0 ${place * length}%`;
  };

  const point = (kind, place) => { at[kind] = place; draw(); };
  const hold = (kind, place) => { held[kind] = held[kind] === place ? null : place; at[kind] = place; draw(); };
  const release = () => { held.head = held.token = null; at.token = null; draw(); };

  for (const [kind, elements] of [["head", heads], ["token", tokens]]) {
    elements.forEach((element, place) => {
      element.addEventListener("mouseenter", () => point(kind, place));
      element.addEventListener("focus", () => point(kind, place));
      element.addEventListener("click", () => hold(kind, place));
      element.addEventListener("keydown", (event) => {
        if (kind === "token" && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); hold(kind, place); }
      });
    });
  }
  document.querySelector(".tokens").addEventListener("mouseleave", () => point("token", null));

  // In the large pattern a row is a query and a column a key.
  const under = (event) => {
    const box = pattern.getBoundingClientRect(), across = side === "destination";
    const share = across ? (event.clientY - box.top) / box.height : (event.clientX - box.left) / box.width;
    const length = across ? queries : keys;
    return Math.min(Math.max(Math.floor(share * length), 0), length - 1) + (across ? first : 0);
  };
  pattern.addEventListener("mousemove", (event) => point("token", under(event)));
  pattern.addEventListener("mouseleave", () => point("token", null));
  pattern.addEventListener("click", (event) => hold("token", under(event)));

  sides.forEach((button) => button.addEventListener("click", () => { side = button.dataset.side; draw(); }));
  document.addEventListener("click", (event) => { if (!event.target.closest("button, .token, .pattern")) release(); });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") release(); });
  draw();
})();
