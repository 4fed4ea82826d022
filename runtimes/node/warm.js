// The Function that is loaded and called while the Runtime boots, so that a user's finds everything loaded and compiled.
'use strict';

exports.hello = (request, response) => response.status(200).json({ path: request.path, a: request.query.a });
