'use strict';
// Runs the scenarios one file after the other on one broker, and closes with the runner's summary.
//
//   node run.js            all
//   node run.js expiry     the files whose name contains "expiry"

const fs = require('node:fs');
const path = require('node:path');
const { run } = require('node:test');
const { spec } = require('node:test/reporters');
const { stopAll } = require('./lib/process.js');
const { Broker } = require('./lib/rabbit.js');

const FILE_MS = 180_000;

async function main() {
  const wanted = process.argv.slice(2);
  const folder = path.join(__dirname, 'scenarios');
  const files = fs.readdirSync(folder)
    .filter((name) => name.endsWith('.test.js') && (wanted.length === 0 || wanted.some((part) => name.includes(part))))
    .sort()
    .map((name) => path.join(folder, name));
  if (files.length === 0) throw new Error(`no scenario file matches ${wanted.join(', ')}`);

  const broker = await Broker.start();
  process.env.INTEROP_AMQP_URL = broker.url;
  const count = { pass: 0, fail: 0 };
  try {
    const stream = run({ files, concurrency: 1, timeout: FILE_MS });
    stream.on('test:pass', ({ details }) => details.type !== 'suite' && count.pass++);
    stream.on('test:fail', () => count.fail++);
    await new Promise((resolve, reject) => {
      stream.compose(spec).on('error', reject).on('end', resolve).pipe(process.stdout);
    });
  } finally {
    await broker.stop();
    await stopAll();
  }
  console.log(`interop: ${count.pass} passed, ${count.fail} failed`);
  // A run of nothing proves nothing.
  process.exitCode = count.fail > 0 || count.pass === 0 ? 1 : 0;
}

main().catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
