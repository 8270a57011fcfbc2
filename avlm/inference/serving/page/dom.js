// Elements made from names and texts. Nothing here reads HTML, so nothing that is said can become any.

/**
 * @param {string} name  tag, with classes behind dots: "button.act"
 * @param {object} set   properties; `on` holds listeners, `aria` and `data` attributes
 * @param {...(Node|string|null)} children
 */
export function make(name, set = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  const { on = {}, aria = {}, data = {}, ...rest } = set;
  Object.assign(element, rest);
  for (const [event, listener] of Object.entries(on)) element.addEventListener(event, listener);
  for (const [key, value] of Object.entries(aria)) element.setAttribute(`aria-${key}`, value);
  Object.assign(element.dataset, data);
  element.append(...children.filter((child) => child !== null));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the pictures in index.html, by its name. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export const byId = (id) => document.getElementById(id);

/** A button of the row below a turn: a picture whose name is said. */
export function act(name, label, press, set = {}) {
  return make(`button.act.${name}`, { type: "button", title: label, aria: { label }, on: { click: press }, ...set }, icon(name));
}
