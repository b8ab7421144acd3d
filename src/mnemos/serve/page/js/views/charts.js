// Lines over time, as SVG.
import { html } from "../dom.js";

const WIDTH = 600;
const HEIGHT = 150;

/** A round number at or above the value, for the top of an axis. */
export function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

const shortened = (value) => (value >= 10_000 ? `${(value / 1000).toFixed(0)}k` : value >= 10 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1));

/** Series of one length, the newest value last: {name, values, area}. `count`: how many values the width has room for. */
export function Chart({ title, series, count, unit = "", top }) {
  const highest = top ?? ceiling(Math.max(...series.flatMap(({ values }) => values), 0));
  const x = (i, length) => ((count - length + i) / (count - 1)) * WIDTH;
  const y = (value) => HEIGHT - (Math.min(value, highest) / highest) * HEIGHT;
  const line = (values) => values.map((value, i) => `${i ? "L" : "M"}${x(i, values.length).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const now = series.map(({ name, values }) => `${name} ${shortened(values[values.length - 1] ?? 0)}`).join(", ");
  return html`<figure class="chart">
    <figcaption><strong>${title}</strong><span class="keys">${series.map(
      ({ name, values }, i) => html`<span class=${`key s${i}`}><i></i>${name} <b>${shortened(values[values.length - 1] ?? 0)}${unit}</b></span>`,
    )}</span></figcaption>
    <div class="plot">
      <span class="axis highest">${shortened(highest)}</span><span class="axis half">${shortened(highest / 2)}</span>
      <svg viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" role="img" aria-label=${`${title}: ${now}`}>
        <path class="grid" d=${`M0 0.5H${WIDTH}M0 ${HEIGHT / 2}H${WIDTH}M0 ${HEIGHT - 0.5}H${WIDTH}`} />
        ${series.map(
          ({ values, area }, i) => values.length > 1 && html`
            ${area && html`<path class=${`area s${i}`} d=${`${line(values)}L${WIDTH} ${HEIGHT}L${x(0, values.length).toFixed(1)} ${HEIGHT}Z`} />`}
            <path class=${`line s${i}`} d=${line(values)} />`,
        )}
      </svg>
    </div>
  </figure>`;
}
