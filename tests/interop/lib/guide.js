'use strict';
// The code of the guides, taken out of the page as it stands there and run: what docs/ says, works.

const fs = require('node:fs');
const path = require('node:path');

/** The block of a guide that begins with ```js NAME. */
function block(guide, name) {
  const page = fs.readFileSync(path.join(__dirname, '..', '..', '..', 'docs', guide), 'utf8');
  const found = page.split(`\n\`\`\`js ${name}\n`)[1]?.split('\n```\n')[0];
  if (!found) throw new Error(`docs/${guide} has no block of code named ${name}`);
  return found;
}

/**
 * Runs a module's text. Its imports are taken from `from`; what it exports is returned.
 * @param {string} text
 * @param {object} from everything that it may import or use, by name
 */
function run(text, from) {
  const names = [...text.matchAll(/^export (?:async )?(?:class|const|function) (\w+)/gm)].map(([, name]) => name);
  const imported = [...text.matchAll(/^import \{([^}]+)\} from '[^']+';$/gm)].flatMap(([, list]) => list.split(',').map((name) => name.trim()));
  for (const name of imported) if (!(name in from)) throw new Error(`nobody gives ${name}`);
  const body = text.replaceAll(/^import .*$/gm, '').replaceAll(/^export /gm, '');
  return new Function(...Object.keys(from), `'use strict';\n${body}\nreturn { ${names.join(', ')} };`)(...Object.values(from));
}

module.exports = { block, run };
