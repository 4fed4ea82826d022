// Command main is what the conformance tests ask of a Function, as a program.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
)

func main() {
	var together sync.WaitGroup
	together.Add(50)
	released := make(chan struct{})
	text := func(path string, answer func(r *http.Request) string) {
		http.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, answer(r)) })
	}
	text("/{$}", func(*http.Request) string { return "hello, " + os.Getenv("GREETING") })
	text("/hour", func(*http.Request) string { return fmt.Sprint(time.Unix(0, 0).Local().Hour()) })
	text("/unread", func(*http.Request) string { return "unread" })
	text("/data", func(*http.Request) string { data, _ := os.ReadFile("data.txt"); return string(data) })
	text("/stdin", func(*http.Request) string { path, _ := os.Readlink("/proc/self/fd/0"); return path })
	text("/together", func(*http.Request) string { together.Done(); together.Wait(); return "together" })
	text("/line", func(r *http.Request) string {
		fmt.Println("begin", strings.Repeat("x", 3000), r.FormValue("n"), "end")
		return ""
	})
	http.HandleFunc("/fail", func(w http.ResponseWriter, _ *http.Request) {
		log.Print("the reason")
		http.Error(w, "failed", http.StatusInternalServerError)
	})
	http.HandleFunc("/release", func(w http.ResponseWriter, _ *http.Request) {
		close(released)
		w.WriteHeader(http.StatusNoContent)
	})
	http.HandleFunc("/stream", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "first\n")
		_ = http.NewResponseController(w).Flush()
		<-released
		_, _ = io.WriteString(w, "second\n")
	})
	http.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		_, _ = io.Copy(w, r.Body)
	})
	http.HandleFunc("/request", func(w http.ResponseWriter, r *http.Request) {
		told := map[string]any{"method": r.Method, "path": r.URL.Path, "args": r.URL.Query(), "header": r.Header.Get("X-Test")}
		if r.Header.Get("Content-Type") == "application/x-www-form-urlencoded" {
			_ = r.ParseForm()
			told["form"] = r.PostForm
		} else {
			body, _ := io.ReadAll(r.Body)
			told["text"], told["json"] = string(body), json.RawMessage("null")
			if json.Valid(body) {
				told["json"] = json.RawMessage(body)
			}
		}
		w.Header().Set("X-Answer", "yes")
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(told)
	})
	server := &http.Server{Addr: ":" + os.Getenv("PORT")}
	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	go func() {
		if err := server.ListenAndServe(); err != http.ErrServerClosed {
			log.Fatal(err)
		}
	}()
	<-stop.Done()
	_ = server.Shutdown(context.Background())
}
