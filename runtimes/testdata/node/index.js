// What the conformance tests ask of a Function, in Node.
'use strict';

const fs = require('fs');
const functions = require('@google-cloud/functions-framework');

let inside = [], release;
const released = new Promise((resolve) => { release = resolve; });

const answers = {
  '/': (req, res) => res.send('hello, ' + (process.env.GREETING ?? 'nobody')),
  '/request': (req, res) => {
    const json = req.is('json') ? req.body : null, form = req.is('urlencoded') ? req.body : null;
    res.status(201).set('X-Answer', 'yes').json({
      method: req.method, path: req.path, args: req.query, header: req.get('X-Test'), json, form, text: req.rawBody.toString(),
    });
  },
  '/echo': (req, res) => {
    res.type(req.get('Content-Type') ?? 'text/plain');
    if (req.rawBody) res.send(req.rawBody);
    else req.pipe(res);
  },
  '/stream': async (req, res) => {
    res.write('first\n');
    await released;
    res.end('second\n');
  },
  '/release': (req, res) => {
    release();
    res.sendStatus(204);
  },
  '/together': (req, res) => {
    inside.push(res);
    if (inside.length === 50) inside.forEach((each) => each.send('together'));
  },
  '/cut': async (req, res) => {
    await new Promise((resolve) => res.write('first\n', resolve));
    throw new Error('the reason');
  },
  '/fail': async () => { throw new Error('the reason'); },
  '/hour': (req, res) => res.send(String(new Date(0).getHours())),
  '/data': (req, res) => res.send(fs.readFileSync('data.txt', 'utf8')),
  '/line': (req, res) => {
    console.log('begin', 'x'.repeat(3000), req.query.n, 'end');
    res.end();
  },
  '/unread': (req, res) => res.send('unread'),
  '/stdin': (req, res) => res.send(fs.readlinkSync('/proc/self/fd/0')),
};

exports.hello = (req, res) => answers[req.path](req, res);

functions.cloudEvent('event', (event) => {
  const data = Buffer.isBuffer(event.data) ? event.data.toString() : JSON.stringify(event.data);
  console.log(['event', event.id, event.type, event.source, event.subject, data].join('|'));
  if (event.fail) throw new Error('the reason');
});
