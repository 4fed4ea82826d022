// Command function is the sample function in Go. It follows the contract that every sample keeps; see package images.
//
// It is built alone, outside the module, and therefore uses nothing but the standard library.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"syscall"
	"time"
)

// grace is how long requests under way may take after SIGTERM.
const grace = 10 * time.Second

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "function:", err)
		os.Exit(1)
	}
}

func run() error {
	port := os.Getenv("PORT")
	if port == "" {
		port = "8080"
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	listener, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: routes(), ReadHeaderTimeout: time.Minute}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	fmt.Printf("function: go listening on port %s\n", port)
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	draining, stop := context.WithTimeout(context.Background(), grace)
	defer stop()
	if err := server.Shutdown(draining); err != nil {
		return err
	}
	if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", describe)
	mux.HandleFunc("/echo", echo)
	mux.HandleFunc("/sleep", sleep)
	mux.HandleFunc("/env", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, os.Getenv(r.FormValue("name")))
	})
	mux.HandleFunc("/log", func(w http.ResponseWriter, r *http.Request) {
		fmt.Println(r.FormValue("line"))
		w.WriteHeader(http.StatusNoContent)
	})
	return mux
}

func describe(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]string{"runtime": "go", "version": runtime.Version()})
}

func echo(w http.ResponseWriter, r *http.Request) {
	if kind := r.Header.Get("Content-Type"); kind != "" {
		w.Header().Set("Content-Type", kind)
	}
	if r.ContentLength >= 0 {
		w.Header().Set("Content-Length", strconv.FormatInt(r.ContentLength, 10))
	}
	// Without this the server reads ahead, or closes the connection, once a long answer begins before the request's end.
	_ = http.NewResponseController(w).EnableFullDuplex()
	_, _ = io.Copy(w, r.Body)
}

func sleep(w http.ResponseWriter, r *http.Request) {
	ms, err := strconv.ParseUint(r.FormValue("ms"), 10, 32)
	if err != nil {
		http.Error(w, "ms must be a number of milliseconds", http.StatusBadRequest)
		return
	}
	timer := time.NewTimer(time.Duration(ms) * time.Millisecond)
	defer timer.Stop()
	select {
	case <-timer.C:
		_, _ = fmt.Fprintf(w, "%d\n", ms)
	case <-r.Context().Done():
	}
}
