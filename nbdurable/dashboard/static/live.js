// The browser's half of a page: puts the server's HTML into <div id="live">, touching only what changed, turns
// times into words, fetches recorded outputs when they come into view, and sends the clicks of buttons.

const SILENCE_MS = 4000; // the server says something each second

export function render({ model }) {
  const page = document.getElementById("live");
  let heard = Date.now();
  let drawn = 0;

  const draw = () => {
    const [version, html] = model.shown;
    heard = Date.now();
    drawn = version;
    const next = document.createElement("div");
    next.innerHTML = html;
    morphChildren(page, next);
    const title = page.querySelector("[data-title]");
    if (title) document.title = title.dataset.title + " · nbdurable";
    tick(page);
    watch(page);
  };

  page.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-do]");
    if (!button || button.disabled) return;
    const box = button.closest("[data-box]");
    const comment = box && box.querySelector("[data-comment]");
    const by = box && box.querySelector("[data-by]");
    const form = {};
    for (const field of box ? box.querySelectorAll("[data-field]") : []) {
      form[field.dataset.field] = field.type === "checkbox" ? field.checked : field.value;
    }
    for (const other of box ? box.querySelectorAll("button[data-do]") : [button]) other.disabled = true;
    model.send_msg({ do: button.dataset.do, id: button.dataset.id, comment: comment ? comment.value : "", by: by ? by.value : "", form });
  });

  model.on("shown", draw);
  model.on("beat", () => {
    heard = Date.now();
    if (model.beat[1] !== drawn) model.send_msg({ do: "look" });
  });
  model.send_msg({ do: "look" });

  setInterval(async () => {
    tick(page);
    watch(page);
    const silent = Date.now() - heard > SILENCE_MS;
    document.getElementById("silent").hidden = !silent;
    if (silent && document.visibilityState === "visible") {
      try {
        const answer = await fetch(document.body.dataset.alive, { cache: "no-store" });
        const writing = [...document.querySelectorAll("textarea, [data-field]")].some((area) => area.value !== area.defaultValue);
        if ((answer.ok || answer.status === 401) && !writing) location.reload();
      } catch { /* not there yet */ }
    }
  }, 1000);
}

// Morphing ---------------------------------------------------------------------------------------------------

function morph(from, to) {
  if (from.nodeType !== Node.ELEMENT_NODE) {
    if (from.nodeValue !== to.nodeValue) from.nodeValue = to.nodeValue;
    return;
  }
  for (const { name } of [...from.attributes]) {
    if (!to.hasAttribute(name) && !mine(from, name)) from.removeAttribute(name);
  }
  for (const { name, value } of to.attributes) {
    if (from.getAttribute(name) !== value && !mine(from, name)) from.setAttribute(name, value);
  }
  if (from.dataset.src === undefined && from.dataset.at === undefined) morphChildren(from, to);
}

// What the reader or this script changed stays: opened details, the words of times, whether outputs are fetched.
function mine(node, name) {
  return (node.nodeName === "DETAILS" && name === "open") || name === "data-fetched" || (name === "title" && node.dataset.at);
}

function morphChildren(from, to) {
  const keyed = new Map([...from.children].filter((child) => child.id).map((child) => [child.id, child]));
  let here = from.firstChild;
  for (const wanted of [...to.childNodes]) {
    let found = keyed.get(wanted.id);
    if (!wanted.id) {
      found = here;
      while (found && (found.id || found.nodeName !== wanted.nodeName)) found = found.nextSibling;
    }
    if (found) {
      if (found === here) here = here.nextSibling;
      else from.insertBefore(found, here);
      morph(found, wanted);
    } else {
      from.insertBefore(wanted, here);
    }
  }
  while (here) {
    const next = here.nextSibling;
    here.remove();
    here = next;
  }
}

// Times ------------------------------------------------------------------------------------------------------

function tick(page) {
  const now = Date.now() / 1000;
  for (const time of page.querySelectorAll("time[data-at]")) {
    const at = Number(time.dataset.at);
    const words = { ago, since: (s) => span(s), clock: () => clock(at) }[time.dataset.as](now - at);
    if (time.textContent !== words) time.textContent = words;
    const whole = new Date(at * 1000).toLocaleString();
    if (time.title !== whole) time.title = whole;
  }
}

function clock(at) {
  const date = new Date(at * 1000);
  const today = date.toDateString() === new Date().toDateString();
  const time = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  return today ? time : date.toLocaleDateString([], { day: "numeric", month: "short" }) + ", " + time;
}

function ago(seconds) {
  if (seconds < 45) return "just now";
  if (seconds < 3600) return Math.round(seconds / 60) + " min ago";
  if (seconds < 86400) return Math.round(seconds / 3600) + " h ago";
  const days = Math.round(seconds / 86400);
  return days === 1 ? "yesterday" : days + " days ago";
}

function span(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  if (s < 60) return s + " s";
  const [unit, small, length, part] = s < 3600 ? ["min", "s", 60, 1] : s < 86400 ? ["h", "min", 3600, 60] : ["d", "h", 86400, 3600];
  const rest = Math.floor((s % length) / part);
  return Math.floor(s / length) + " " + unit + (rest ? " " + rest + " " + small : "");
}

// Outputs ----------------------------------------------------------------------------------------------------

const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) fetchInto(target);
}, { rootMargin: "400px" });

function watch(page) {
  for (const place of page.querySelectorAll("[data-src]")) {
    if (place.dataset.fetched !== place.dataset.src) { seen.unobserve(place); seen.observe(place); }
  }
}

async function fetchInto(place) {
  const source = place.dataset.src;
  if (place.dataset.fetched === source) return;
  place.dataset.fetched = source;
  try {
    const answer = await fetch(source);
    const html = await answer.text();
    if (place.dataset.src === source) place.innerHTML = answer.ok ? html : "";
    if (!answer.ok) place.textContent = "The outputs can't be shown: the page was answered with status " + answer.status + ".";
  } catch {
    delete place.dataset.fetched;
  }
}
