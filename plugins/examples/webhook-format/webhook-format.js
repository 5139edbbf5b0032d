// Turns the JSON that GitHub and its likes send for a push into one line of text:
//
//     alice pushed 2 commits to acme/site main: Fix the header (and 1 more) https://…
//
// Component: `handle` is exported under that name; what it throws is its error message.

import log from "circleosd:plugin/log@0.1.0";

const LONGEST_FIELD = 100;

// One line, without control characters, and not too long, whatever the sender put there.
function clean(value) {
  const characters = [...String(value).replace(/[\p{Cc}\p{Zl}\p{Zp}]+/gu, " ").trim()];
  return characters.length <= LONGEST_FIELD
    ? characters.join("")
    : characters.slice(0, LONGEST_FIELD - 1).join("").trimEnd() + "…";
}

function firstLine(message) {
  return clean(String(message ?? "").trimStart().split(/[\r\n]/, 1)[0]) || "(no message)";
}

// "branch main" and "main" for refs/heads/main, "tag v1.0" for refs/tags/v1.0.
function readRef(ref) {
  const match = /^refs\/(heads|tags)\/(.+)$/su.exec(ref);
  if (match === null) {
    throw "expected a ref that begins with refs/heads/ or refs/tags/, found " + clean(ref);
  }
  const name = clean(match[2]);
  return match[1] === "heads" ? { noun: `branch ${name}`, name } : { noun: `tag ${name}`, name: `tag ${name}` };
}

function format(event) {
  const ref = readRef(event.ref);
  const who = clean(event.pusher?.name ?? event.sender?.login ?? "someone");
  const where = clean(event.repository?.full_name ?? "an unnamed repository");
  const commits = Array.isArray(event.commits) ? event.commits : [];
  if (event.deleted === true) {
    return `${who} deleted ${ref.noun} in ${where}`;
  }
  const words = [who];
  if (commits.length === 0) {
    words.push(event.created === true ? `created ${ref.noun} in ${where}` : `moved ${ref.noun} in ${where}`);
  } else {
    const count = commits.length === 1 ? "1 commit" : `${commits.length} commits`;
    const verb = event.forced === true ? "force-pushed" : "pushed";
    const last = event.head_commit ?? commits[commits.length - 1];
    words.push(`${verb} ${count} to ${where} ${ref.name}: ${firstLine(last?.message)}`);
    if (commits.length > 1) {
      words.push(`(and ${commits.length - 1} more)`);
    }
  }
  if (typeof event.compare === "string" && event.compare.startsWith("https://")) {
    words.push(clean(event.compare));
  }
  return words.join(" ");
}

export function describe() {
  return "Turns the webhook of a push into one line of text";
}

export function handle(payload) {
  let event;
  try {
    event = JSON.parse(payload);
  } catch (error) {
    throw `expected a JSON document: ${error.message}`;
  }
  if (typeof event?.ref !== "string") {
    throw "expected a push event: an object with a member ref";
  }
  const line = format(event);
  log.write("info", `a push to ${clean(event.ref)}`);
  return line;
}
