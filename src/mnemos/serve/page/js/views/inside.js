// Look inside: a reply's tokens in the colour of their probability, each with the alternatives that the model weighed.
import * as chats from "../chats.js";
import { classes, html, memo, useEffect, useLayoutEffect, useRef, useState } from "../dom.js";
import { goOnWith } from "../replies.js";
import { isSpecial, level, percent, perplexity, textOf, visible } from "../tokens.js";
import { IconButton } from "./icons.js";

const GROUP = 128; // tokens that are drawn together, so that a new token redraws one group alone

const Group = memo(({ tokens, first, count, current, shown }) =>
  html`<span class="token-group">${tokens.slice(first, first + count).map((token, i) => {
    const index = first + i;
    const other = token.a?.length && token.a[0].t !== token.t;
    return html`<span role="button" data-index=${index} tabindex=${index === current ? 0 : -1} aria-haspopup="dialog"
      aria-expanded=${index === shown ? "true" : "false"} aria-label=${`${visible(token.t)}, ${token.f ? "chosen by you" : percent(token.p)}`}
      class=${classes("token", `p${level(token.p)}`, other && "second", token.f && "forced", index === shown && "shown")}
      >${token.t}</span>`;
  })}</span>`,
);

function Alternatives({ token, anchor, busy, onChoose, onClose }) {
  const box = useRef(null);
  const listed = token.a ?? [];
  const rows = listed.some((one) => one.t === token.t) ? listed : [...listed, token];
  useLayoutEffect(() => {
    place(box.current, anchor);
    (box.current.querySelector("ol button:not(:disabled)") ?? box.current.querySelector("button")).focus({ preventScroll: true });
    const outside = (event) => !box.current?.contains(event.target) && !event.target.closest?.(".token") && onClose();
    const moved = () => box.current && place(box.current, anchor);
    document.addEventListener("pointerdown", outside);
    document.addEventListener("scroll", moved, true);
    return () => {
      document.removeEventListener("pointerdown", outside);
      document.removeEventListener("scroll", moved, true);
    };
  }, [anchor]);
  const keys = (event) => {
    const buttons = [...box.current.querySelectorAll("button:not(:disabled)")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      buttons[(buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length]?.focus();
    } else if (event.key === "Escape" || event.key === "Tab") {
      event.preventDefault();
      event.stopPropagation();
      onClose(true);
    }
  };
  return html`<div class="alternatives" role="dialog" aria-label=${`Alternatives to ${visible(token.t)}`} ref=${box} onKeyDown=${keys}>
    <div class="alternatives-head"><span>${token.f ? "You chose this token" : "The model weighed"}</span>
      <${IconButton} icon="close" label="Close" onClick=${() => onClose(true)} /></div>
    <ol>${rows.map((one) => {
      const own = one.t === token.t;
      return html`<li class=${own ? "own" : ""}>
        <div class="bar" style=${{ width: `${Math.max(100 * Math.exp(one.p), 0.5)}%` }}></div>
        <code>${visible(one.t)}</code><span class="share">${percent(one.p)}</span>
        ${own
          ? html`<span class="mark">${token.f ? "yours" : "written"}</span>`
          : html`<button type="button" disabled=${busy || one.p === -Infinity} onClick=${() => onChoose(one)}
              aria-label=${`${isSpecial(one.t) ? "End the reply here" : "Go on from here"} with ${visible(one.t)}, ${percent(one.p)}`}>${
                isSpecial(one.t) ? "End the reply here" : "Go on from here with this one"
              }</button>`}
      </li>`;
    })}</ol>
  </div>`;
}

/** Below the token, or above it where there is no room; a narrow window has it at its foot (by the style sheet). */
function place(box, anchor) {
  const at = anchor.getBoundingClientRect();
  const size = box.getBoundingClientRect();
  const left = Math.min(Math.max(at.left, 8), window.innerWidth - size.width - 8);
  const below = at.bottom + 6;
  const top = below + size.height < window.innerHeight - 8 ? below : Math.max(at.top - size.height - 6, 8);
  box.style.setProperty("--left", `${left}px`);
  box.style.setProperty("--top", `${top}px`);
}

export function Inside({ conversation, node, busy }) {
  const [stored, setStored] = useState(null);
  const [shown, setShown] = useState(null);
  const [current, setCurrent] = useState(0);
  const frame = useRef(null);
  const tokens = chats.tokensNow(node.id) ?? stored;
  useEffect(() => {
    let wanted = true;
    if (!busy) chats.tokensOf(node.id).then((found) => wanted && setStored(found));
    return () => (wanted = false);
  }, [node.id, busy]);

  if (!tokens) return html`<p class="help">Reading the tokens …</p>`;
  if (!tokens.length) {
    return html`<p class="note">${
      busy ? "Waiting for the first token." : "This reply came without probabilities. Regenerate it to look inside."
    }</p>`;
  }
  const element = (index) => frame.current?.querySelector(`[data-index="${index}"]`);
  const go = (index) => {
    const next = Math.min(Math.max(index, 0), tokens.length - 1);
    setCurrent(next);
    element(next)?.focus();
  };
  const close = (refocus) => {
    if (refocus) element(shown)?.focus();
    setShown(null);
  };
  const click = (event) => {
    const index = event.target.closest(".token")?.dataset.index;
    if (index === undefined) return;
    setCurrent(Number(index));
    setShown(shown === Number(index) ? null : Number(index));
  };
  const keys = (event) => {
    const index = event.target.closest(".token")?.dataset.index;
    if (index === undefined) return;
    const step = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (step) go(Number(index) + step);
    else if (event.key === "Enter" || event.key === " ") setShown(Number(index));
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const choose = (alternative) => {
    const index = shown;
    setShown(null);
    goOnWith(conversation, node.id, index, alternative);
  };
  const groups = Array.from({ length: Math.ceil(tokens.length / GROUP) }, (_, i) => i * GROUP);
  const token = tokens[shown];
  return html`<div class="inside">
    <div class="legend"><span>certain</span>${[0, 1, 2, 3, 4, 5].map((n) => html`<i class=${`p${n}`}></i>`)}<span>surprising</span>
      <span class="figures">${tokens.length} tokens · perplexity ${perplexity(tokens).toFixed(2)}</span></div>
    <div class="tokens" ref=${frame} role="group" aria-label="Tokens; arrow keys go from one to the next, Enter shows alternatives"
      onClick=${click} onKeyDown=${keys}>${groups.map((first) => {
        const count = Math.min(GROUP, tokens.length - first);
        const inGroup = (index) => (index >= first && index < first + count ? index : null);
        return html`<${Group} key=${first} tokens=${tokens} first=${first} count=${count}
          current=${inGroup(current)} shown=${inGroup(shown)} />`;
      })}</div>
    ${token && element(shown) && html`<${Alternatives} key=${shown} token=${token} anchor=${element(shown)}
      busy=${busy || textOf(tokens.slice(0, shown)) === null} onChoose=${choose} onClose=${close} />`}
  </div>`;
}
