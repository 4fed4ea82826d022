// Command logwriter writes the output of a container to a log file of bounded size: see package logfile. containerd's shim starts
// one beside each Function's container, and not nodeagent, so that a Function's output is taken while nodeagent is restarted.
//
// The shim gives it the ends of two pipes as descriptors 3 and 4, and one to close when it is ready as 5; its arguments are pairs, in
// any order: file PATH, bytes LIMIT, and where the output is shown elsewhere too, pipe INODE of PID: the pipe that is the standard
// output of that process.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"syscall"

	"golang.org/x/time/rate"

	"github.com/hearth-serverless/hearth/internal/logfile"
)

// Whoever writes faster than this, for longer than the burst lasts, waits: a flood takes a few percent of a core, and no more of the
// disk's time than a neighbour can spare.
const (
	bytesPerSecond = 32 << 20
	burstBytes     = 32 << 20
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "logwriter:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	runtime.GOMAXPROCS(1) // there is one of these for each container; it waits, and copies
	debug.SetGCPercent(25)
	to, err := parse(args)
	if err != nil {
		return err
	}
	var also *logfile.Mirror
	if to.pipe != 0 {
		if also, err = logfile.OpenMirror(to.of, to.pipe); err != nil { // its process may have ended; the file is what counts
			fmt.Fprintln(os.Stderr, "logwriter:", err)
		}
	}
	w, err := logfile.Open(to.path, to.limit, also)
	if err != nil {
		return err
	}
	var sources []logfile.Source
	for _, fd := range []int{3, 4} {
		if err := syscall.SetNonblock(fd, true); err != nil {
			return fmt.Errorf("descriptor %d: %w", fd, err)
		}
		sources = append(sources, os.NewFile(uintptr(fd), "output"))
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM) // the container has ended
	defer stop()
	if err := syscall.Close(5); err != nil {
		return fmt.Errorf("tell the shim: %w", err)
	}
	return logfile.Collect(ctx, w, rate.NewLimiter(bytesPerSecond, burstBytes), sources...)
}

// target is where the output goes.
type target struct {
	path  string
	limit int64
	pipe  uint64 // 0: nowhere else
	of    uint32
}

func parse(args []string) (to target, err error) {
	given := map[string]string{}
	for n := 0; n+1 < len(args); n += 2 {
		given[args[n]] = args[n+1]
	}
	to.path = given["file"]
	to.limit, err = strconv.ParseInt(given["bytes"], 10, 64)
	known := 2
	if given["pipe"] != "" {
		var pipeErr, ofErr error
		var of uint64
		to.pipe, pipeErr = strconv.ParseUint(given["pipe"], 10, 64)
		of, ofErr = strconv.ParseUint(given["of"], 10, 32)
		to.of, known, err = uint32(of), 4, errors.Join(err, pipeErr, ofErr)
	}
	if err != nil || to.path == "" || len(given) != known {
		return target{}, fmt.Errorf("got %q: usage: logwriter file PATH bytes LIMIT [pipe INODE of PID], started by containerd's shim", args)
	}
	return to, nil
}
