'use strict';
// The test client in a real browser, against the real local stack: deploy/local/run is started, used and stopped.
//
//   node run.js            everything
//   node run.js expiry     the claims whose name contains "expiry"
//
// Screenshots are left in target/e2e/. CHROMIUM and SEATLOCK_BIN name other programs than the usual ones.

const fs = require('node:fs');
const path = require('node:path');
const { BIN, Stack } = require('./lib/stack.js');
const { Browser } = require('./lib/browser.js');
const { stopAll } = require('../interop/lib/process.js');
const { within } = require('../interop/lib/wait.js');

const CLAIM_MS = 120_000;
const SHOTS = path.join(__dirname, '..', '..', 'target', 'e2e');

async function main() {
  const wanted = process.argv.slice(2);
  const claims = require('./claims.js').filter(({ name }) => wanted.length === 0 || wanted.some((part) => name.includes(part)));
  if (claims.length === 0) throw new Error(`no claim is named ${wanted.join(', ')}`);
  fs.rmSync(SHOTS, { recursive: true, force: true });
  fs.mkdirSync(SHOTS, { recursive: true });

  const count = { passed: 0, failed: 0 };
  const settle = (name, began, error) => {
    count[error ? 'failed' : 'passed'] += 1;
    console.log(`${error ? '✖' : '✔'} ${name} (${Date.now() - began} ms)${error ? `\n${error.stack ?? error}` : ''}`);
  };
  let stack;
  let browser;
  try {
    let began = Date.now();
    stack = await Stack.start();
    console.log(`the local stack runs, ${Date.now() - began} ms`);
    browser = await Browser.launch(SHOTS);
    for (const { name, body } of claims) {
      began = Date.now();
      try {
        await within(CLAIM_MS, name, body({ stack, browser, bin: BIN }));
        settle(name, began);
      } catch (error) {
        await browser.evidence(name.split(':')[0]);
        console.log(stack.log.slice(-20).join('\n'));
        settle(name, began, error);
      }
      await browser.forget();
    }
    await browser.close();
    browser = undefined;
    began = Date.now();
    try {
      await stack.stop();
      settle('deploy/local: Ctrl-C stops everything that was started', began);
    } catch (error) {
      settle('deploy/local: Ctrl-C stops everything that was started', began, error);
    }
    stack = undefined;
  } finally {
    await browser?.close();
    await stack?.stop();
    await stopAll();
  }
  console.log(`screenshots: ${path.relative(process.cwd(), SHOTS) || SHOTS}`);
  console.log(`e2e: ${count.passed} passed, ${count.failed} failed`);
  process.exitCode = count.failed > 0 || count.passed === 0 ? 1 : 0;
}

main().catch((error) => {
  console.error(error.stack ?? error);
  process.exitCode = 1;
});
