'use strict';
// The NestJS of the wanted major, and what a program needs to be driven by the runner.
//
// The applications are plain JavaScript: a decorator is a function, and is called as one. No build step stands between
// the packages and the wire.

const path = require('node:path');
const { createRequire } = require('node:module');

const major = process.env.NEST_MAJOR;
const load = createRequire(path.join(__dirname, '..', `nest${major}`, 'package.json'));
load('reflect-metadata');

const common = load('@nestjs/common');
const core = load('@nestjs/core');
const microservices = load('@nestjs/microservices');
const rxjs = load('rxjs');

/** Applies method decorators: `{method: decorator}`. */
function decorate(Class, decorators) {
  for (const [method, decorator] of Object.entries(decorators)) {
    decorator(Class.prototype, method, Object.getOwnPropertyDescriptor(Class.prototype, method));
  }
}

/** Declares what the constructor is given, by token. */
function inject(Class, ...tokens) {
  tokens.forEach((token, index) => common.Inject(token)(Class, undefined, index));
}

/** Answers the runner: each operation is `async (args) => value`. */
function serve(operations) {
  process.on('message', async ({ id, op, args }) => {
    try {
      const value = await operations[op](args);
      process.send({ id, value: value === undefined ? null : value });
    } catch (error) {
      // What a Nest caller catches is the parsed `err` itself, a string or a plain object, seldom an Error.
      process.send({ id, failure: error instanceof Error ? `${error.name}: ${error.message}` : error });
    }
  });
  process.on('disconnect', () => process.exit(0));
  process.send({ ready: true });
}

module.exports = { common, core, decorate, inject, microservices, rxjs, serve, settings: JSON.parse(process.env.SETTINGS) };
