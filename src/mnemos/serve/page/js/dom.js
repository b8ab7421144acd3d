// Preact with htm, and the few helpers that all components share.
import { Component, h, html, render, useEffect, useLayoutEffect, useRef, useState } from "../vendor/preact.js";

export { Component, h, html, render, useEffect, useLayoutEffect, useRef, useState };

/** A component that is drawn again only when one of its props is another object or value. */
export function memo(inner) {
  return class extends Component {
    shouldComponentUpdate(next) {
      const keys = new Set([...Object.keys(next), ...Object.keys(this.props)]);
      return [...keys].some((key) => next[key] !== this.props[key]);
    }

    render(props) {
      return h(inner, props);
    }
  };
}

const CALM = 40; // ms between drawings of a text that streams: more frames would take time from the engine beside it

/** A value with listeners, which are called at most once a frame however often it changes. */
export class Signal {
  constructor(value) {
    this.current = value;
    this.listeners = new Set();
    this.scheduled = false;
    this.timer = null;
    this.drawn = 0;
  }

  get value() {
    return this.current;
  }

  set value(value) {
    if (value !== this.current) {
      this.current = value;
      this.changed();
    }
  }

  /** Tells the listeners in the next frame; call it after a change inside the value. `calm`: not in every frame. */
  changed({ calm = false } = {}) {
    if (this.scheduled || (calm && this.timer)) return;
    const wait = calm ? this.drawn + CALM - performance.now() : 0;
    if (wait > 0) {
      this.timer = setTimeout(() => this.changed(), wait);
      return;
    }
    clearTimeout(this.timer);
    this.scheduled = true;
    nextFrame(() => {
      this.scheduled = false;
      this.timer = null;
      this.drawn = performance.now();
      for (const listener of [...this.listeners]) listener(this.current);
    });
  }

  subscribe(listener) {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }
}

/** The signal's value; the component is drawn again when it changes. */
export function useSignal(signal) {
  const [, redraw] = useState(0);
  useLayoutEffect(() => signal.subscribe(() => redraw((n) => n + 1)), [signal]);
  return signal.value;
}

/** Calls back before the next frame; in a hidden page, which has no frames, soon. */
function nextFrame(callback) {
  if (document.hidden) setTimeout(callback, 100);
  else requestAnimationFrame(callback);
}

export function newId() {
  // crypto.randomUUID exists only in secure contexts; plain http to another machine is none.
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Joins the class names that are set. */
export function classes(...names) {
  return names.filter(Boolean).join(" ");
}

/** Offers a text as a file to save. */
export function download(name, text, type = "application/json") {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Copies a text; also where the clipboard's own interface is missing, as on plain http. */
export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "visually-hidden";
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** What a screen reader says next, politely. */
export const announcement = new Signal("");

export function announce(text) {
  announcement.value = text;
}
