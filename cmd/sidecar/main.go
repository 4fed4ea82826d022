// Command sidecar stands before a Function in its Instance: see package sidecar. It is told what to do on a Unix socket, whose
// path is its one argument.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/hearth-serverless/hearth/sidecar"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: sidecar SOCKET")
		os.Exit(2)
	}
	runtime.GOMAXPROCS(1)  // a request is one goroutine's at a time; handing it from thread to thread costs more than it brings
	debug.SetGCPercent(25) // half the memory of the default, at no cost that could be measured
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := sidecar.New().Run(ctx, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
