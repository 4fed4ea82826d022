package faults

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	throttled   = 2 * time.Second // for which 429 is the answer
	failures    = 3               // of each layer's first requests in a burst of 5xx
	cuts        = 4               // of each layer's first answers
	tokenUses   = 5               // after which a token has expired
	signedUses  = 3               // after which a signed URL has
	missedBytes = 1000            // by which a Content-Length is wrong
)

// All are the faults that there are.
func All() []Fault {
	return []Fault{
		{Name: "429", About: fmt.Sprintf("every layer is refused with 429 and a Retry-After, for %v", throttled), spoil: tooMany},
		{Name: "5xx", About: fmt.Sprintf("each layer's first %d requests fail with 503, 500 and 502", failures), spoil: serverErrors},
		{Name: "range-ignored", About: "a range is answered with 200 and all of the layer", spoil: rangeIgnored},
		{Name: "reset", About: fmt.Sprintf("each layer's first %d answers are reset at a random byte", cuts), spoil: reset},
		{Name: "stall", About: "each layer's first answer stalls half-way, for ever", spoil: stall},
		{Name: "token-expires", About: fmt.Sprintf("a bearer token is needed, and expires after %d requests", tokenUses), spoil: tokenExpires},
		{Name: "redirect-expires", About: fmt.Sprintf("layers are at signed URLs that expire after %d requests", signedUses), spoil: redirectExpires},
		{Name: "truncated", About: "the registry has only half of each layer", Want: Refused, spoil: truncated},
		{Name: "corrupt", About: "one byte of each layer is another", Want: Refused, spoil: corrupt},
		{Name: "wrong-length", About: fmt.Sprintf("Content-Length is %d bytes more than what comes", missedBytes), Want: Either, spoil: wrongLength},
	}
}

func tooMany(layers map[string]int64, honest http.Handler) http.Handler {
	var mu sync.Mutex // guards end
	var end time.Time
	return eachAsk(layers, honest, func(w http.ResponseWriter, r *http.Request, _ ask) {
		mu.Lock()
		if end.IsZero() {
			end = time.Now().Add(throttled)
		}
		left := time.Until(end)
		mu.Unlock()
		if left <= 0 {
			honest.ServeHTTP(w, r)
			return
		}
		retryAfter(w, http.StatusTooManyRequests, left+time.Second/2)
	})
}

func serverErrors(layers map[string]int64, honest http.Handler) http.Handler {
	return eachAsk(layers, honest, func(w http.ResponseWriter, r *http.Request, a ask) {
		if a.times > failures {
			honest.ServeHTTP(w, r)
			return
		}
		status := []int{http.StatusServiceUnavailable, http.StatusInternalServerError, http.StatusBadGateway}[(a.times-1)%3]
		http.Error(w, http.StatusText(status), status)
	})
}

func rangeIgnored(layers map[string]int64, honest http.Handler) http.Handler {
	return eachAsk(layers, honest, func(w http.ResponseWriter, r *http.Request, _ ask) {
		r.Header.Del("Range")
		honest.ServeHTTP(w, r)
	})
}

func reset(layers map[string]int64, honest http.Handler) http.Handler {
	return eachAsk(layers, honest, func(w http.ResponseWriter, r *http.Request, a ask) {
		if a.times > cuts {
			honest.ServeHTTP(w, r)
			return
		}
		first, last, _ := a.asked(r)
		at := rand.Int64N(max(1, last-first+1))
		honest.ServeHTTP(&changed{ResponseWriter: w, piece: func(before int64, p []byte, write func([]byte)) {
			if keep := at - before; keep < int64(len(p)) {
				write(p[:max(0, keep)])
				hangUp(w)
			}
			write(p)
		}}, r)
	})
}

// hangUp resets the connection of an answer under way, after what was written of it.
func hangUp(w http.ResponseWriter) {
	control := http.NewResponseController(w)
	_ = control.Flush()
	if conn, _, err := control.Hijack(); err == nil {
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		_ = conn.Close()
	}
	panic(http.ErrAbortHandler)
}

func stall(layers map[string]int64, honest http.Handler) http.Handler {
	return eachAsk(layers, honest, func(w http.ResponseWriter, r *http.Request, a ask) {
		if a.times > 1 {
			honest.ServeHTTP(w, r)
			return
		}
		first, last, _ := a.asked(r)
		half := (last - first + 1) / 2
		honest.ServeHTTP(&changed{ResponseWriter: w, piece: func(at int64, p []byte, write func([]byte)) {
			if keep := half - at; keep < int64(len(p)) {
				write(p[:max(0, keep)])
				_ = http.NewResponseController(w).Flush()
				<-r.Context().Done()
				panic(http.ErrAbortHandler)
			}
			write(p)
		}}, r)
	})
}

// tokenExpires is a registry with the token scheme of distribution, which gives a token to everyone.
func tokenExpires(_ map[string]int64, honest http.Handler) http.Handler {
	var tokens tokens
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/token" {
			token := tokens.issue()
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(map[string]any{"token": token, "access_token": token, "expires_in": 60, "issued_at": time.Now().UTC()})
			return
		}
		if token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); tokens.use(token) {
			honest.ServeHTTP(w, r)
			return
		}
		repository, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/")
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="faults",scope="repository:%s:pull"`, r.Host, repository))
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"token expired"}]}`, http.StatusUnauthorized)
	})
}

// tokens count how often each was used.
type tokens struct {
	mu   sync.Mutex // guards uses
	uses map[string]int
}

func (t *tokens) issue() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.uses == nil {
		t.uses = map[string]int{}
	}
	token := fmt.Sprintf("token-%d", len(t.uses)+1)
	t.uses[token] = 0
	return token
}

// use reports whether a token is still good.
func (t *tokens) use(token string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	used, ok := t.uses[token]
	if !ok || used >= tokenUses {
		return false
	}
	t.uses[token]++
	return true
}

func redirectExpires(layers map[string]int64, honest http.Handler) http.Handler {
	const prefix = "/signed/"
	var mu sync.Mutex // guards uses, of each URL that was signed
	var uses []int
	front := eachAsk(layers, honest, func(w http.ResponseWriter, r *http.Request, _ ask) {
		mu.Lock()
		uses = append(uses, 0)
		to := fmt.Sprintf("http://%s%s%d%s", r.Host, prefix, len(uses)-1, r.URL.Path)
		mu.Unlock()
		http.Redirect(w, r, to, http.StatusTemporaryRedirect)
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		signed, ok := strings.CutPrefix(r.URL.Path, prefix)
		if !ok {
			front.ServeHTTP(w, r)
			return
		}
		number, blob, _ := strings.Cut(signed, "/")
		i, err := strconv.Atoi(number)
		mu.Lock()
		valid := err == nil && i >= 0 && i < len(uses) && uses[i] < signedUses
		if valid {
			uses[i]++
		}
		mu.Unlock()
		if !valid {
			http.Error(w, "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>", http.StatusForbidden)
			return
		}
		r.URL.Path = "/" + blob
		honest.ServeHTTP(w, r)
	})
}

func truncated(layers map[string]int64, honest http.Handler) http.Handler {
	return eachAsk(layers, honest, func(w http.ResponseWriter, r *http.Request, a ask) {
		half := a.bytes / 2
		first, last, partial := a.asked(r)
		if first >= half {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", half))
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
			return
		}
		last = min(last, half-1)
		r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", first, last))
		honest.ServeHTTP(&changed{ResponseWriter: w, header: func(status int) int {
			if !partial {
				w.Header().Del("Content-Range")
				return http.StatusOK
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, half))
			return status
		}}, r)
	})
}

func corrupt(layers map[string]int64, honest http.Handler) http.Handler {
	return eachAsk(layers, honest, func(w http.ResponseWriter, r *http.Request, a ask) {
		first, _, _ := a.asked(r)
		wrong := a.bytes/2 - first // counted from the first byte of the answer
		honest.ServeHTTP(&changed{ResponseWriter: w, piece: func(at int64, p []byte, write func([]byte)) {
			if wrong >= at && wrong < at+int64(len(p)) {
				p = append([]byte(nil), p...)
				p[wrong-at] ^= 1
			}
			write(p)
		}}, r)
	})
}

func wrongLength(layers map[string]int64, honest http.Handler) http.Handler {
	return eachAsk(layers, honest, func(w http.ResponseWriter, r *http.Request, _ ask) {
		honest.ServeHTTP(&changed{ResponseWriter: w, header: func(status int) int {
			if n, err := strconv.Atoi(w.Header().Get("Content-Length")); err == nil {
				w.Header().Set("Content-Length", strconv.Itoa(n+missedBytes))
			}
			return status
		}}, r)
	})
}

// changed is an answer whose header or content is spoilt on its way.
type changed struct {
	http.ResponseWriter
	// header may change the header, and returns the status.
	header func(status int) int
	// piece writes a piece of content, given the number of bytes before it.
	piece func(at int64, p []byte, write func([]byte))
	at    int64
}

// WriteHeader implements http.ResponseWriter.
func (c *changed) WriteHeader(status int) {
	if c.header != nil {
		status = c.header(status)
	}
	c.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (c *changed) Write(p []byte) (n int, err error) {
	if c.piece == nil {
		return c.ResponseWriter.Write(p)
	}
	c.piece(c.at, p, func(piece []byte) {
		if err == nil {
			_, err = c.ResponseWriter.Write(piece)
		}
	})
	c.at += int64(len(p))
	return len(p), err
}

// Unwrap is for http.ResponseController.
func (c *changed) Unwrap() http.ResponseWriter { return c.ResponseWriter }
