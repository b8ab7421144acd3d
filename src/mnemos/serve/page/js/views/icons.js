// Icons as lines on a grid of 24, in the colour of the text beside them.
import { html } from "../dom.js";

const PATHS = {
  menu: "M4 7h16M4 12h16M4 17h16",
  plus: "M12 5v14M5 12h14",
  search: "M11 5a6 6 0 1 0 0 12 6 6 0 0 0 0-12zM15.5 15.5 20 20",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h10v11H9zM15 9V4H5v11h4",
  check: "M5 12.5 10 17 19 7",
  edit: "M4 20l1-5L16 4l4 4L9 19z",
  retry: "M19 12a7 7 0 1 1-2.2-5.1M17 3v4h-4",
  left: "M14.5 6l-6 6 6 6",
  right: "M9.5 6l6 6-6 6",
  down: "M6 10l6 6 6-6",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  more: "M6 12h.01M12 12h.01M18 12h.01",
  close: "M6 6l12 12M18 6 6 18",
  clip: "M19 11l-7.5 7.5a4.5 4.5 0 0 1-6.4-6.4L13 4.3a3 3 0 0 1 4.2 4.2l-7.8 7.8a1.5 1.5 0 0 1-2.1-2.1L14 7.5",
  sliders: "M4 8h9M17 8h3M4 16h3M11 16h9M15 5.5a2.5 2.5 0 1 1 0 5 2.5 2.5 0 0 1 0-5zM9 13.5a2.5 2.5 0 1 1 0 5 2.5 2.5 0 0 1 0-5z",
  eye: "M2.5 12S6 5.5 12 5.5 21.5 12 21.5 12 18 18.5 12 18.5 2.5 12 2.5 12zM12 9.5a2.5 2.5 0 1 0 0 5 2.5 2.5 0 0 0 0-5z",
  columns: "M4 5h16v14H4zM12 5v14",
  pulse: "M3 12h4l3-7 4 14 3-7h4",
  chat: "M5 5h14v11h-8l-4 4v-4H5z",
  fork: "M7 4v16M7 13c0-4 10-2 10-7M17 6V4M14.5 6.5 17 4l2.5 2.5",
  forward: "M5 12h13M13 6l6 6-6 6",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6 19 19M19 5l-1.4 1.4M6.4 17.6 5 19",
  keyboard: "M3 7h18v11H3zM7 11h.01M11 11h.01M15 11h.01M8 15h8",
  save: "M12 4v11M7 11l5 5 5-5M5 20h14",
  load: "M12 16V5M7 9l5-5 5 5M5 20h14",
  file: "M7 3h7l4 4v14H7zM14 3v4h4",
  reset: "M5 12a7 7 0 1 0 2.2-5.1M7 3v4h4",
  sidebar: "M4 5h16v14H4zM9.5 5v14",
};

export function Icon({ name }) {
  return html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true"><path d=${PATHS[name]} /></svg>`;
}

/** A button that shows an icon; its label is its tooltip and what a screen reader says. */
export function IconButton({ icon, label, shortcut, class: name, ...props }) {
  return html`<button type="button" class=${`icon-button ${name ?? ""}`} title=${shortcut ? `${label} (${shortcut})` : label}
    aria-label=${label} ...${props}><${Icon} name=${icon} /></button>`;
}

export function Logo() {
  return html`<svg class="logo" viewBox="0 0 32 32" aria-hidden="true">
    <rect width="32" height="32" rx="8" /><path d="M8 23V11.5a3.5 3.5 0 0 1 7 0 1 1 0 0 0 2 0 3.5 3.5 0 0 1 7 0V23" /></svg>`;
}
