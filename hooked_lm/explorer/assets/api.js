// Requests to the explorer's server. A newer request for a view makes the answers to older ones of no interest.

const newest = new Map();

export class Superseded extends Error {}

/** Return the answer of a view; throws an Error with the server's words, or Superseded. */
export async function ask(view, fields) {
  const number = (newest.get(view) ?? 0) + 1;
  newest.set(view, number);
  let response;
  try {
    response = await fetch(`/api/${view}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(fields),
    });
  } catch {
    throw new Error("The explorer's server does not answer: is `hooked-lm explore` still running?");
  }
  const answer = await response.json();
  if (number !== newest.get(view)) throw new Superseded();
  if (answer.superseded) throw new Superseded();
  if (answer.error) throw new Error(answer.error);
  return answer;
}

/** Return what the server says of the model. */
export async function modelCard() {
  return (await fetch("/api/model")).json();
}
