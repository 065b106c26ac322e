// Reads [[page, location], ...] as JSON, and writes the URLs that browsers would open (WHATWG URL standard).
import { readFileSync } from "node:fs";

const cases = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(cases.map(([page, location]) => {
  try {
    return new URL(location, page).href;
  } catch {
    return null;
  }
})));
