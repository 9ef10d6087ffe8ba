// What both peers share: tokens, and a server that is tuned as the documentation of socket.io says.

'use strict';

const crypto = require('node:crypto');
const http = require('node:http');
const { Server } = require('socket.io');

function user(token) {
  const [head, body, signature] = String(token).split('.');
  const wanted = crypto.createHmac('sha256', process.env.SECRET).update(`${head}.${body}`).digest('base64url');
  if (wanted !== signature) throw new Error('unauthorized');
  const claims = JSON.parse(Buffer.from(body, 'base64url'));
  if (claims.exp * 1000 < Date.now()) throw new Error('token_expired');
  return Number(claims.sub);
}

exports.serve = (onConnection) => {
  const server = http.createServer();
  const io = new Server(server, {
    transports: ['websocket'],
    perMessageDeflate: false,
    httpCompression: false,
    serveClient: false,
    pingInterval: 25_000,
    // A loop that is busy with a room for half a minute must not lose the room.
    pingTimeout: 120_000,
  });
  // The request is not needed after the handshake and holds its headers and its socket's parser.
  io.engine.on('connection', (raw) => { raw.request = null; });
  const namespace = io.of('/realtime');
  namespace.use((socket, next) => {
    try {
      socket.data.user = user(socket.handshake.auth.token);
      next();
    } catch (error) {
      next(error);
    }
  });
  namespace.on('connection', (socket) => onConnection(socket, namespace));
  process.on('SIGUSR2', () => global.gc());
  process.on('SIGTERM', () => process.exit(0));
  server.listen(Number(process.env.PORT), '127.0.0.1');
};
