// Markdown as elements. Text comes into the page as text nodes only, so nothing that a model writes is ever
// read as HTML; links keep the schemes below.

const SAFE_LINK = /^(https?:|mailto:)/i;
const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** Return a fragment with the blocks of a text. */
export function render(text) {
  const fragment = document.createDocumentFragment();
  addBlocks(fragment, text.replace(/\r\n?/g, "\n").split("\n"), 0);
  return fragment;
}

function addBlocks(parent, lines, depth) {
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) addInline(parent.appendChild(element("p")), paragraph.join("\n"));
    paragraph = [];
  };
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    const heading = line.match(HEADING);
    const fence = line.match(FENCE);
    if (!line.trim()) {
      flush();
      i++;
    } else if (fence) {
      flush();
      i = addCode(parent, lines, i, fence);
    } else if (heading) {
      flush();
      const level = Math.min(5, heading[1].length + 2);
      addInline(parent.appendChild(element(`h${level}`)), heading[2].trim().replace(/ #+$/, ""));
      i++;
    } else if (RULE.test(line)) {
      flush();
      parent.append(element("hr"));
      i++;
    } else if (/^ {0,3}>/.test(line) && depth < 8) {
      flush();
      const start = i;
      while (i < lines.length && /^ {0,3}>/.test(lines[i])) i++;
      const quoted = lines.slice(start, i).map((quote) => quote.replace(/^ {0,3}> ?/, ""));
      addBlocks(parent.appendChild(element("blockquote")), quoted, depth + 1);
    } else if (ITEM.test(line) && depth < 8) {
      flush();
      i = addList(parent, lines, i, depth);
    } else if (line.includes("|") && isTableRule(lines[i + 1] ?? "")) {
      flush();
      i = addTable(parent, lines, i);
    } else {
      paragraph.push(line.trim());
      i++;
    }
  }
  flush();
}

function isTableRule(line) {
  return line.length < 1000 && TABLE_RULE.test(line);
}

function addCode(parent, lines, start, [, indent, fence, language]) {
  let end = start + 1;
  const closes = (line) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");
  while (end < lines.length && !closes(lines[end])) end++;
  const text = lines
    .slice(start + 1, end)
    .map((line) => (line.startsWith(indent) ? line.slice(indent.length) : line))
    .join("\n");
  const copy = element("button", { type: "button", className: "quiet", textContent: "Copy" });
  copy.addEventListener("click", async () => {
    await navigator.clipboard?.writeText(text);
    copy.textContent = "Copied";
  });
  const head = element("div", {}, element("span", { textContent: language || "text" }), copy);
  const code = element("pre", {}, element("code", { textContent: text }));
  parent.append(element("div", { className: "code" }, head, code));
  return end + 1;
}

function addList(parent, lines, start, depth) {
  const [, indent, marker] = lines[start].match(ITEM);
  const ordered = /\d/.test(marker);
  const list = parent.appendChild(element(ordered ? "ol" : "ul"));
  if (ordered) list.start = parseInt(marker, 10);
  let i = start;
  while (i < lines.length) {
    const item = lines[i].match(ITEM);
    if (!item || item[1].length !== indent.length || /\d/.test(item[2]) !== ordered) break;
    const inner = indent.length + item[2].length + 1;
    const content = [item[3]];
    for (i++; i < lines.length; i++) {
      const blank = !lines[i].trim();
      const own = lines[i].match(/^\s*/)[0].length > indent.length;
      if (blank ? !/^\s/.test(lines[i + 1] ?? "") : !own) break;
      content.push(lines[i].slice(Math.min(inner, lines[i].match(/^\s*/)[0].length)));
    }
    const made = list.appendChild(element("li"));
    addBlocks(made, content, depth + 1);
    if (made.firstChild?.nodeName === "P" && !content.includes("")) made.firstChild.replaceWith(...made.firstChild.childNodes);
    while (i < lines.length && !lines[i].trim() && ITEM.test(lines[i + 1] ?? "")) i++;
  }
  return i;
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function addTable(parent, lines, start) {
  const row = (name, line) => {
    const made = element("tr");
    for (const cell of cells(line)) addInline(made.appendChild(element(name)), cell);
    return made;
  };
  const body = element("tbody");
  let i = start + 2;
  for (; i < lines.length && lines[i].includes("|"); i++) body.append(row("td", lines[i]));
  const table = element("table", {}, element("thead", {}, row("th", lines[start])), body);
  parent.append(element("div", { className: "scroll" }, table));
  return i;
}

// Code first: what stands in it is no markup. Lengths are bounded, so that the time is linear in the text.
const INLINE = new RegExp(
  [
    /(`+)([^`]|[^`][\s\S]{0,2000}?[^`])\1(?!`)/, // code
    /\\([\\`*_{}[\]()#+\-.!|~>])/, // an escaped character
    /!?\[([^[\]]{0,1000})\]\([ \n]{0,9}([^\s()]{1,2000}(?:\([^\s()]{0,1000}\))?)(?:[ \n]{1,9}"[^"]{0,1000}")?[ \n]{0,9}\)/,
    /\*\*(?=\S)([\s\S]{0,2000}?\S)\*\*/,
    /__(?=\S)([\s\S]{0,2000}?\S)__(?!\w)/,
    /\*(?=[^\s*])([\s\S]{0,2000}?[^\s*])\*(?!\*)/,
    /\b_(?=\S)([^_]{0,2000}[^\s_])_(?!\w)/,
    /~~(?=\S)([\s\S]{0,2000}?\S)~~/,
    /(https?:\/\/[^\s<>()[\]"'`]{0,2000}[^\s<>()[\]"'`.,;:!?*_])/,
  ]
    .map(({ source }) => source)
    .join("|"),
  "g",
);

function addInline(parent, text, depth = 0) {
  let last = 0;
  const nested = (name, content) => addInline(parent.appendChild(element(name)), content, depth + 1);
  if (depth > 8) return void parent.append(text);
  for (const match of text.matchAll(INLINE)) {
    const [whole, , code, escaped, label, target, strong, strong2, em, em2, gone, bare] = match;
    addText(parent, text.slice(last, match.index));
    last = match.index + whole.length;
    if (code !== undefined) parent.append(element("code", { textContent: code }));
    else if (escaped !== undefined) parent.append(escaped);
    else if (target !== undefined) addLink(parent, target, label || target, whole, depth);
    else if (bare !== undefined) addLink(parent, bare, null, whole, depth);
    else if (strong ?? strong2) nested("strong", strong ?? strong2);
    else if (em ?? em2) nested("em", em ?? em2);
    else nested("s", gone);
  }
  addText(parent, text.slice(last));
}

function addLink(parent, target, label, whole, depth) {
  if (!SAFE_LINK.test(target)) return void parent.append(whole);
  const link = element("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow" });
  if (label === null) link.textContent = target;
  else addInline(link, label, 8 + depth);
  parent.append(link);
}

/** Append text whose line ends are breaks, as chats write them. */
function addText(parent, text) {
  text.split("\n").forEach((line, i) => parent.append(...(i ? [element("br"), line] : [line])));
}
