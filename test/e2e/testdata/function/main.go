// Command main is a Function whose answer is the name of its process, so that who asks can tell Instances apart.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == "say" { // by kubectl exec
		fmt.Println(os.Args[2])
		return
	}
	name := rand.Text()
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if line := r.FormValue("line"); line != "" {
			fmt.Println(line)
		}
		_, _ = io.WriteString(w, name)
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
