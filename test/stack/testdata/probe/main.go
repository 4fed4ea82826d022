// Command probe is a function that tells of itself what a test of concurrency has to know, or ends at once if it is told to.
package main

import (
	"fmt"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "fall" {
		fmt.Println("warming up")
		fmt.Fprintln(os.Stderr, "probe: out of coal")
		os.Exit(7)
	}
	var mu sync.Mutex // guards now and most
	var now, most int
	http.HandleFunc("/busy", func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		now++
		most = max(most, now)
		seen := most
		mu.Unlock()
		ms, _ := strconv.Atoi(r.FormValue("ms"))
		time.Sleep(time.Duration(ms) * time.Millisecond)
		mu.Lock()
		now--
		seen = max(seen, most)
		mu.Unlock()
		host, _ := os.Hostname()
		fmt.Fprintf(w, "%s %d", host, seen)
	})
	fmt.Println(http.ListenAndServe(":"+os.Getenv("PORT"), nil))
	os.Exit(1)
}
