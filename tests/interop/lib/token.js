'use strict';
// Tokens as the login service of the running systems writes them: HS256, the user id in `sub`.

const { createHmac } = require('node:crypto');

const SECRET = 'an interop secret of more than 32 bytes, used nowhere else';

const part = (value) => Buffer.from(JSON.stringify(value)).toString('base64url');

/** `claims` may override anything, also with `undefined`; `secret` makes a forgery. */
function token(user, { claims = {}, expiresIn = 3600, secret = SECRET } = {}) {
  const now = Math.floor(Date.now() / 1000);
  const head = `${part({ alg: 'HS256', typ: 'JWT' })}.${part({ sub: String(user), iat: now, exp: now + expiresIn, ...claims })}`;
  return `${head}.${createHmac('sha256', secret).update(head).digest('base64url')}`;
}

module.exports = { SECRET, token };
