// A reply's tokens with their probabilities: {t: text, p: log probability, a: [alternatives], b: bytes}. `b` is there only
// where the text is not the whole truth: a token that is part of a character. `f` marks a token that the reader chose.

const decoder = new TextDecoder("utf-8", { fatal: true });

function compact({ token, logprob, bytes }) {
  const whole = !bytes || !token.includes("\ufffd");
  return whole ? { t: token, p: logprob } : { t: token, p: logprob, b: bytes };
}

/** Tokens from `choices[0].logprobs.content` of a chunk. */
export function readTokens(content) {
  return content.map((entry) => ({ ...compact(entry), a: (entry.top_logprobs ?? []).map(compact) }));
}

/** The text of these tokens; null if they end inside a character. */
export function textOf(tokens) {
  const encoder = new TextEncoder();
  const parts = tokens.map((token) => (token.b ? Uint8Array.from(token.b) : encoder.encode(token.t)));
  const whole = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  let offset = 0;
  for (const part of parts) {
    whole.set(part, offset);
    offset += part.length;
  }
  try {
    return decoder.decode(whole);
  } catch {
    return null;
  }
}

/** Whether the text is that of a special token, such as the end of the reply, which cannot be continued. */
export function isSpecial(text) {
  return /^<(?:\|[^|]+\|?|\/?s|eos|bos|pad|unk|start_of_turn|end_of_turn)>$/.test(text);
}

/** From 0 (all but certain) to 5 (a surprise): the class of a token's colour. */
export function level(logprob) {
  const p = Math.exp(logprob);
  return p >= 0.9 ? 0 : p >= 0.6 ? 1 : p >= 0.3 ? 2 : p >= 0.1 ? 3 : p >= 0.02 ? 4 : 5;
}

export function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  return p >= 99.95 ? "100%" : p >= 10 ? `${p.toFixed(0)}%` : p >= 0.1 ? `${p.toFixed(1)}%` : "<0.1%";
}

/** The token's text with its spaces visible. */
export function visible(text) {
  return text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
}

/** exp of the mean surprise: how many equally probable tokens the model chose among, on average. */
export function perplexity(tokens) {
  const own = tokens.filter((token) => !token.f);
  return own.length ? Math.exp(-own.reduce((sum, token) => sum + token.p, 0) / own.length) : NaN;
}
