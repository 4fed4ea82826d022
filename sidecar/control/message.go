package control

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
)

// Socket is the name of the socket in the directory that nodeagent and sidecar share.
const Socket = "sidecar.sock"

const (
	maxLineBytes   = 64 << 10
	maxNameBytes   = 128
	maxTargets     = 8
	maxConcurrency = 100_000
	maxQueue       = 1_000_000
)

// Message is one line. Exactly one field is set.
type Message struct {
	Status *Status `json:"status,omitempty"` // the sidecar's first word on every connection

	Serve *Serve `json:"serve,omitempty"` // nodeagent asks
	Drain *Empty `json:"drain,omitempty"`

	Serving *Serving `json:"serving,omitempty"` // the sidecar answers
	Drained *Empty   `json:"drained,omitempty"`
	Failed  *Failure `json:"failed,omitempty"`

	Ready   *Empty   `json:"ready,omitempty"` // the sidecar tells
	Refused *Failure `json:"refused,omitempty"`
}

// Empty is a message that says nothing but what it is.
type Empty struct{}

// Serving says where requests and probes are taken: the ports that the system chose, if the question left it to it.
type Serving struct {
	Listen netip.AddrPort `json:"listen"`
	Probe  netip.AddrPort `json:"probe,omitzero"`
}

// Failure says why.
type Failure struct {
	Error string `json:"error"`
}

// Status is how a sidecar stands when a connection begins.
type Status struct {
	Protocol int    `json:"protocol"`
	Function string `json:"function,omitempty"` // that it serves or has served; empty before
	Serving  bool   `json:"serving,omitempty"`  // it takes requests
	Ready    bool   `json:"ready,omitempty"`    // its Function accepts connections
	InFlight int    `json:"in_flight,omitempty"`
}

// Protocol is the version that this package speaks.
const Protocol = 1

// Serve tells a sidecar what it is the sidecar of. It never changes: another Serve says the same again, after a drain for example.
type Serve struct {
	// Function names what is served, for people: a Revision.
	Function string `json:"function"`
	// Listen is where requests come in, and Probe where /healthz and /readyz are answered; none if it is zero.
	Listen netip.AddrPort `json:"listen"`
	Probe  netip.AddrPort `json:"probe,omitzero"`
	// Targets are where the Function may listen; the first that accepts is taken.
	Targets []netip.AddrPort `json:"targets"`
	// Concurrency is how many requests the Function gets at once, Queue how many wait besides.
	Concurrency int `json:"concurrency"`
	Queue       int `json:"queue"`
}

// Equal tells whether both say the same.
func (s *Serve) Equal(o *Serve) bool {
	a, _ := json.Marshal(s) // nothing in it fails to encode: check was passed
	b, _ := json.Marshal(o)
	return bytes.Equal(a, b)
}

func (s *Serve) check() error {
	switch {
	case s.Function == "" || len(s.Function) > maxNameBytes:
		return fmt.Errorf("function has a name of %d bytes, not 1 to %d", len(s.Function), maxNameBytes)
	case !s.Listen.IsValid():
		return errors.New("listen is no ADDRESS:PORT")
	case len(s.Targets) == 0 || len(s.Targets) > maxTargets:
		return fmt.Errorf("%d targets are not 1 to %d", len(s.Targets), maxTargets)
	case s.Concurrency < 1 || s.Concurrency > maxConcurrency:
		return fmt.Errorf("concurrency %d is not 1 to %d", s.Concurrency, maxConcurrency)
	case s.Queue < 0 || s.Queue > maxQueue:
		return fmt.Errorf("queue %d is not 0 to %d", s.Queue, maxQueue)
	}
	for _, t := range s.Targets {
		if !t.IsValid() || t.Port() == 0 {
			return errors.New("a target is no ADDRESS:PORT")
		}
	}
	return nil
}

// check makes sure that exactly one thing is said, and that it can be.
func (m *Message) check() error {
	said := 0
	for _, is := range []bool{
		m.Status != nil, m.Serve != nil, m.Drain != nil, m.Serving != nil, m.Drained != nil, m.Failed != nil,
		m.Ready != nil, m.Refused != nil,
	} {
		if is {
			said++
		}
	}
	if said != 1 {
		return fmt.Errorf("%d things are said in one line, not one", said)
	}
	if m.Serve != nil {
		return m.Serve.check()
	}
	return nil
}

// reader reads messages from the other side, which need not be friendly.
type reader struct{ lines *bufio.Scanner }

func newReader(from io.Reader) reader {
	s := bufio.NewScanner(from)
	s.Buffer(make([]byte, 0, 512), maxLineBytes)
	return reader{s}
}

// next returns io.EOF when the other side has ended.
func (r reader) next() (*Message, error) {
	if !r.lines.Scan() {
		if err := r.lines.Err(); err != nil {
			return nil, fmt.Errorf("control: %w", err)
		}
		return nil, io.EOF
	}
	return Parse(r.lines.Bytes())
}

// Parse reads one line. Fields that it does not know are ignored; a line in which nothing is said that it knows is an error.
func Parse(line []byte) (*Message, error) {
	if len(line) > maxLineBytes {
		return nil, fmt.Errorf("control: a line of %d bytes, over %d", len(line), maxLineBytes)
	}
	m := new(Message)
	if err := json.Unmarshal(line, m); err != nil {
		return nil, fmt.Errorf("control: %w", err)
	}
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("control: %w", err)
	}
	return m, nil
}

// write sends a message in one piece.
func write(to io.Writer, m *Message) error {
	line, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("control: %w", err)
	}
	if _, err := to.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("control: %w", err)
	}
	return nil
}
