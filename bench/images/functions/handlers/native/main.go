// Command main is the sample Function as a program: it answers with a greeting and its digest.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"log"
	"net/http"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		name := r.URL.Query().Get("name")
		if name == "" {
			name = "world"
		}
		digest := sha256.Sum256([]byte(name))
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]string{"hello": name, "digest": hex.EncodeToString(digest[:])})
	})
	server := &http.Server{Addr: ":" + os.Getenv("PORT")}
	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- server.ListenAndServe() }()
	<-stop.Done()
	if err := server.Shutdown(context.Background()); err != nil {
		log.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
		log.Fatal(err)
	}
}
