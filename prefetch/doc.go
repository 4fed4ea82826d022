// Package prefetch has in memory what a start reads, before the start asks for it.
//
// A profile says which pages of which files of an image a Function had mapped when it began to listen: the interpreter and its
// libraries, a few per cent of the image. It is read from the process itself (proc_pid_maps(5), proc_pid_pagemap(5)), which every
// kernel has. What a start reads without mapping it is not seen; tracing of the page cache is to come. When the image is prepared
// again, on a node that was booted since or was short of memory, the profile's ranges are read ahead.
//
// A profile is a hint. One that is stale, cut short or made up by somebody costs a bounded time and memory, and nothing else:
// paths are opened below the image's root only, and every number has a limit.
package prefetch
