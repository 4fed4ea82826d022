// Package logfile is the file that a program's output goes to: one that never takes more than so much of the disk, however much is
// written and whoever reads it meanwhile. What is oldest goes first.
//
// A file that has had too much begins with a hole: its oldest part is given back to the file system (fallocate(2), PUNCH_HOLE), and
// the offsets of the rest stay what they were, so that whoever follows it need not find its place again. Right behind the hole is a
// line that says what was lost. Where the file system makes no holes the file is emptied instead, and begins with that line.
//
// One Writer writes to a file. Others may rename it and, between its writes, empty it.
package logfile
