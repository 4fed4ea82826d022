// The sample Function in Node: answers with a greeting and its digest.
'use strict';

const crypto = require('crypto');
const functions = require('@google-cloud/functions-framework');

functions.http('hello', (req, res) => {
  const name = req.query.name ?? 'world';
  res.json({ hello: name, digest: crypto.createHash('sha256').update(name).digest('hex') });
});
