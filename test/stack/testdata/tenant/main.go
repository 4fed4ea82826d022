// Command tenant is a function that tells whose it is, by all that a node gives to one: its code, environment and secret. When it is
// asked to, it does what a function can do to harm its neighbours. Each harm has an end of its own, far beyond what must be allowed,
// so that a missing limit fails a test and not the machine.
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "child" {
		time.Sleep(time.Hour)
		return
	}
	listener, err := net.Listen("tcp", ":"+os.Getenv("PORT"))
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	number := func(r *http.Request, name string) int {
		n, _ := strconv.Atoi(r.FormValue(name))
		return n
	}
	http.HandleFunc("/who", who)
	http.HandleFunc("/log", func(_ http.ResponseWriter, r *http.Request) { fmt.Println(r.FormValue("line")) })
	http.HandleFunc("/fork", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, fork(number(r, "n"))) })
	http.HandleFunc("/hog", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, hog(number(r, "mib"))) })
	http.HandleFunc("/fill", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, fill(r.FormValue("dir"), number(r, "mib")))
	})
	http.HandleFunc("/files", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, files(r.FormValue("dir"), number(r, "n")))
	})
	http.HandleFunc("/flood", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, flood(number(r, "mib"))) })
	http.HandleFunc("/deaf", func(http.ResponseWriter, *http.Request) { signal.Ignore(syscall.SIGTERM, syscall.SIGINT) })
	http.HandleFunc("/close", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Connection", "close")
		_ = listener.Close()
	})
	// Serve ends when the listener is closed; the process does not.
	fmt.Println(http.Serve(listener, nil))
	time.Sleep(time.Hour)
}

// who reads anew for each request what it tells.
func who(w http.ResponseWriter, _ *http.Request) {
	code, codeErr := os.ReadFile(filepath.Join(filepath.Dir(os.Args[0]), "whose"))
	secret, secretErr := os.ReadFile("/run/secrets/whose")
	if codeErr != nil || secretErr != nil {
		http.Error(w, fmt.Sprint(codeErr, secretErr), http.StatusInternalServerError)
		return
	}
	fmt.Fprintf(w, "%s %s %s", code, os.Getenv("WHOSE"), secret)
}

// fork starts processes that stay, and says how many it was refused.
func fork(n int) (refused int) {
	for range n {
		if exec.Command("/proc/self/exe", "child").Start() != nil {
			refused++
		}
	}
	return refused
}

// hog takes memory and uses it.
func hog(mib int) (taken int) {
	var held [][]byte
	for range mib {
		block := make([]byte, 1<<20)
		for i := 0; i < len(block); i += 4096 {
			block[i] = 1
		}
		held = append(held, block)
	}
	return len(held)
}

// fill writes a file as long as it can, and says how long.
func fill(dir string, mib int) (written int) {
	f, err := os.Create(dir + "/fill")
	if err != nil {
		return 0
	}
	defer f.Close()
	block := make([]byte, 1<<20)
	for range mib {
		if _, err := f.Write(block); err != nil {
			return written
		}
		written++
	}
	return written
}

// files makes empty ones, which take none of what a file system has but memory.
func files(dir string, n int) (made int) {
	for made < n {
		f, err := os.Create(dir + "/" + strconv.Itoa(made))
		if err != nil {
			return made
		}
		_ = f.Close() // it has nothing
		made++
	}
	return made
}

// flood writes lines to the log.
func flood(mib int) (written int) {
	block := strings.Repeat(strings.Repeat("x", 1023)+"\n", 1024)
	for range mib {
		if _, err := os.Stdout.WriteString(block); err != nil {
			return written
		}
		written++
	}
	return written
}
