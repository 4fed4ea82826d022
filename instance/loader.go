package instance

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of the conversation with a loader, which ends in the hands of a Function: all that it says is hostile.
const (
	// maxLoaderLine is the longest line, in both directions.
	maxLoaderLine = 1 << 20
	// maxLoadFailure bounds what a caller is told of a Function that did not load.
	maxLoadFailure = 16 << 10
	maxLoadPhases  = 16
	maxPhaseName   = 32
	maxLoadTime    = time.Hour // that a phase may claim to have taken
	maxLoaderName  = 256
	maxMissing     = 32
	seedBytes      = 32
	loaderProtocol = 1
)

// loader is nodeagent's end of the conversation of docs/RUNTIMES.md with one loader. Questions are asked one at a time. A loader
// that says anything unasked, too long or malformed is done with.
type loader struct {
	conn   net.Conn
	exited <-chan struct{} // closed when the loader's process has ended
	first  chan word       // its greeting
	done   chan struct{}   // closed when nothing more will come

	mu     sync.Mutex // guards what follows
	asked  chan word  // where the next word goes; nil if nobody has asked
	err    error      // why nothing more comes, once done
	closed bool       // by us
	prompt bool       // by its greeting

	begun, loaded time.Time                    // when it was asked to load, and when it had
	imports       func(imports, time.Duration) // is told, once, what the load has imported, and how long it took
}

// word is a line of a loader's. One of its fields is set.
type word struct {
	Ready     *greeting `json:"ready"`
	Loaded    *loaded   `json:"loaded"`
	Failed    *failed   `json:"failed"`
	Executing *struct{} `json:"executing"`
	Resumed   *struct{} `json:"resumed"`
	Imported  *imports  `json:"imported"`
}

// greeting is the word that a connection begins with.
type greeting struct {
	Protocol int               `json:"protocol"`
	Runtime  string            `json:"runtime"`
	Loaded   bool              `json:"loaded"`
	Prompt   bool              `json:"prompt"`  // it takes in what it is told before any request that comes later
	Missing  map[string]string `json:"missing"` // libraries that could not be preloaded, and why
}

type loaded struct {
	Phases loadPhases `json:"phases"`
}

type failed struct {
	Error string `json:"error"`
	Trace string `json:"trace"`
}

// loadQuestion is all that a loader is told of a Function.
type loadQuestion struct {
	Code      string            `json:"code"`
	Handler   string            `json:"handler"`
	Signature string            `json:"signature"`
	Address   string            `json:"address"`
	Env       map[string]string `json:"env"`
	Seed      []byte            `json:"seed"`
	Imports   bool              `json:"imports"` // are to be told, when there is nothing else to do
}

type thawedQuestion struct {
	Seed   []byte  `json:"seed"`
	Frozen float64 `json:"frozen"` // seconds
}

// loadPhase is a part of a load, by the loader's own account.
type loadPhase struct {
	Name     string
	Duration time.Duration
}

// loadPhases are a JSON object's members in their order.
type loadPhases []loadPhase

// UnmarshalJSON implements json.Unmarshaler.
func (p *loadPhases) UnmarshalJSON(text []byte) error {
	dec := json.NewDecoder(bytes.NewReader(text))
	if open, err := dec.Token(); err != nil || open != json.Delim('{') {
		return errors.New("phases are no object")
	}
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return err
		}
		var seconds float64
		if err := dec.Decode(&seconds); err != nil {
			return fmt.Errorf("phase %.40q: %w", name, err)
		}
		phase, _ := name.(string) // a key is one
		if len(*p) == maxLoadPhases || len(phase) > maxPhaseName || !isLabel(phase) {
			return fmt.Errorf("phase %.40q: more than %d, or not a name of at most %d characters", phase, maxLoadPhases, maxPhaseName)
		}
		if seconds < 0 || seconds > maxLoadTime.Seconds() {
			return fmt.Errorf("phase %.40q took %g s", phase, seconds)
		}
		*p = append(*p, loadPhase{phase, time.Duration(seconds * float64(time.Second))})
	}
	return nil
}

// parseWord reads a line.
func parseWord(line []byte) (word, error) {
	var w word
	if err := json.Unmarshal(line, &w); err != nil {
		return word{}, fmt.Errorf("the loader's word is malformed: %w", err)
	}
	said := 0
	for _, is := range []bool{w.Ready != nil, w.Loaded != nil, w.Failed != nil, w.Executing != nil, w.Resumed != nil, w.Imported != nil} {
		if is {
			said++
		}
	}
	if said != 1 {
		return word{}, fmt.Errorf("the loader says %d things in one line", said)
	}
	return w, nil
}

// newLoader takes over a connection to a loader, which has not been read from.
func newLoader(conn net.Conn, exited <-chan struct{}) *loader {
	first := make(chan word, 1)
	l := &loader{conn: conn, exited: exited, first: first, asked: first, done: make(chan struct{})}
	go l.read()
	return l
}

// read passes words on until there are no more; close waits for it.
func (l *loader) read() {
	err := l.readWords()
	l.mu.Lock()
	l.err = err
	l.mu.Unlock()
	_ = l.conn.Close() // the reason is known
	close(l.done)
}

func (l *loader) readWords() error {
	r := bufio.NewReader(l.conn)
	for {
		line, err := readLine(r)
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) { // the latter if it ended in our backlog
			return errLoaderGone
		}
		if err != nil {
			return fmt.Errorf("read from the loader: %w", err)
		}
		w, err := parseWord(line)
		if err != nil {
			return err
		}
		if err := l.pass(w); err != nil {
			return err
		}
	}
}

// pass passes a word on to whom it is meant for.
func (l *loader) pass(w word) error {
	if w.Imported != nil {
		return l.tell(*w.Imported)
	}
	l.mu.Lock()
	to := l.asked
	l.asked = nil
	if w.Loaded != nil {
		l.loaded = time.Now()
	}
	l.mu.Unlock()
	if to == nil {
		return errors.New("the loader spoke without having been asked")
	}
	to <- w // has room for one
	return nil
}

// tell passes on what a load has imported, which comes whenever the loader finds the time for it.
func (l *loader) tell(list imports) error {
	l.mu.Lock()
	tell, took := l.imports, l.loaded.Sub(l.begun)
	l.imports = nil
	early := l.loaded.IsZero()
	l.mu.Unlock()
	if tell == nil || early {
		return errors.New("the loader tells of imports without having been asked, or before it has loaded anything")
	}
	tell(list, took)
	return nil
}

var errLoaderGone = errors.New("the loader ended the connection")

// readLine reads a line of at most maxLoaderLine bytes.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		piece, err := r.ReadSlice('\n')
		if len(line)+len(piece) > maxLoaderLine {
			return nil, fmt.Errorf("a line of more than %d bytes", maxLoaderLine)
		}
		line = append(line, piece...)
		switch {
		case err == nil:
			return line, nil
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF) && len(line) > 0:
			return nil, io.ErrUnexpectedEOF
		default:
			return nil, err
		}
	}
}

// await waits for a word. What was said before the end is heard.
func (l *loader) await(ctx context.Context, answer <-chan word) (word, error) {
	select {
	case w := <-answer:
		return w, nil
	case <-l.done:
	case <-l.exited: // a child of its may hold the connection open; but what it said last may be on its way
		timer := time.NewTimer(outputDelay)
		defer timer.Stop()
		select {
		case <-l.done:
		case <-timer.C:
		}
	case <-ctx.Done():
		_ = l.conn.Close() // an answer to this question would be taken for one to the next
		return word{}, fmt.Errorf("the loader does not answer: %w", ctx.Err())
	}
	select {
	case w := <-answer:
		return w, nil
	default:
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return word{}, l.err
	}
	return word{}, errLoaderGone
}

// ask asks and waits for the answer.
func (l *loader) ask(ctx context.Context, what string, question any) (word, error) {
	answer, err := l.put(ctx, what, question)
	if err != nil {
		return word{}, err
	}
	return l.await(ctx, answer)
}

// put asks, and says where the answer will be.
func (l *loader) put(ctx context.Context, what string, question any) (<-chan word, error) {
	var line bytes.Buffer
	enc := json.NewEncoder(&line)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(map[string]any{what: question}); err != nil {
		return nil, fmt.Errorf("encode %s: %w", what, err)
	}
	if line.Len() > maxLoaderLine {
		return nil, fmt.Errorf("what the loader is to be told takes %d bytes, over %d: is the environment that large?", line.Len(), maxLoaderLine)
	}
	answer := make(chan word, 1)
	l.mu.Lock()
	busy := l.asked != nil
	if !busy {
		l.asked = answer
	}
	l.mu.Unlock()
	if busy {
		return nil, errors.New("the loader has not answered the last question")
	}
	defer context.AfterFunc(ctx, func() { _ = l.conn.SetWriteDeadline(time.Unix(1, 0)) })() // a write that waits ends
	_, _ = l.conn.Write(line.Bytes())                                                       // if it fails, the reader tells why, or that there was an answer already
	return answer, nil
}

// greet waits for the loader's first word.
func (l *loader) greet(ctx context.Context) (*greeting, error) {
	w, err := l.await(ctx, l.first)
	if err != nil {
		return nil, err
	}
	switch {
	case w.Ready == nil:
		return nil, errors.New("the loader's first word is not ready")
	case w.Ready.Protocol != loaderProtocol:
		return nil, fmt.Errorf("the loader speaks protocol %d, not %d", w.Ready.Protocol, loaderProtocol)
	}
	w.Ready.Runtime = printable(w.Ready.Runtime, maxLoaderName)
	l.mu.Lock()
	l.prompt = w.Ready.Prompt
	l.mu.Unlock()
	return w.Ready, nil
}

// missingLibraries describes what was not preloaded, in few words.
func (g *greeting) missingLibraries() []string {
	var list []string
	for name, why := range g.Missing {
		if len(list) == maxMissing {
			break
		}
		list = append(list, printable(name, maxLoaderName)+": "+printable(why, maxLoaderName))
	}
	return list
}

// load has the loader load a Function. executing is whether it became the Function's process, which may not listen yet. told hears later
// what was imported, and how long the load took, if the loader tells; it must not block.
func (l *loader) load(ctx context.Context, q loadQuestion, told func(imports, time.Duration)) (phases []loadPhase, executing bool, err error) {
	q.Seed, q.Imports = seed(), true
	l.mu.Lock()
	l.begun, l.imports = time.Now(), told
	l.mu.Unlock()
	w, err := l.ask(ctx, "load", q)
	switch {
	case err != nil:
		return nil, false, err
	case w.Loaded != nil:
		return w.Loaded.Phases, false, nil
	case w.Executing != nil:
		return nil, true, nil
	case w.Failed != nil:
		text := printable(w.Failed.Error, maxLoadFailure/4)
		if w.Failed.Trace != "" {
			text += "\n" + printable(w.Failed.Trace, maxLoadFailure-len(text)-1)
		}
		return nil, false, &loadError{text}
	}
	return nil, false, errors.New("the loader's answer to load is none")
}

// loadError is a Function's own fault, in the loader's words.
type loadError struct{ text string }

func (e *loadError) Error() string { return e.text }

// thawed tells a loader that it was frozen for a while; answered waits until it has done what follows from that, and ends the
// conversation if it does not. A frozen loader finds the question as soon as it is thawed.
func (l *loader) thawed(ctx context.Context, frozenFor time.Duration) (answered func() error, err error) {
	answer, err := l.put(ctx, "thawed", thawedQuestion{Seed: seed(), Frozen: frozenFor.Seconds()})
	if err != nil {
		return nil, err
	}
	return func() error {
		w, err := l.await(ctx, answer)
		if err == nil && w.Resumed == nil {
			_ = l.conn.Close() // it has not done it
			err = errors.New("the loader's answer to thawed is none")
		}
		return err
	}, nil
}

// seed is fresh randomness for the generators that a language keeps in memory.
func seed() []byte {
	b := make([]byte, seedBytes)
	_, _ = rand.Read(b) // never fails
	return b
}

// isPrompt is whether a thawed loader may be sent requests before it has answered.
func (l *loader) isPrompt() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.prompt
}

// close ends the conversation; the loader goes on, and accepts again.
func (l *loader) close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	_ = l.conn.Close() // it is only let go of
	<-l.done
}

// gone is why the loader ended the conversation, or nil if it was us.
func (l *loader) gone() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	return l.err
}

// printable makes foreign text fit to be shown: at most n bytes, of which beginning and end are kept, and no control characters
// but those of lines.
func printable(text string, n int) string {
	const gap = "\n[…]\n"
	if len(text) > n {
		half := max(0, n-len(gap)) / 2
		text = text[:half] + gap + text[len(text)-half:]
	}
	text = strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' || r >= 0x7f && r < 0xa0 {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
	return strings.TrimSpace(text)
}
