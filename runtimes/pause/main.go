// Command pause is what runs in an Instance's sandbox before, and beside, the user's process: it holds the pod's
// namespaces open and does nothing. As process 1 of a shared process namespace it also inherits every orphan, so it
// reaps them. It ends with status 0 on SIGTERM or SIGINT.
//
// It is built alone, outside the module, and therefore uses nothing but the standard library.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	// One slot is enough: signals merge, and each one reaps all that are dead.
	dead := make(chan os.Signal, 1)
	signal.Notify(dead, syscall.SIGCHLD)
	reap() // those that ended before there was anyone to tell
	for {
		select {
		case <-stop:
			os.Exit(0)
		case <-dead:
			reap()
		}
	}
}

// reap collects every child that has ended, without waiting for those that have not.
func reap() {
	for {
		pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if pid <= 0 {
			return
		}
	}
}
