package gateway

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/hearth-serverless/hearth/internal/relay"
)

// copyBytes is what is copied of a body at once.
const copyBytes = 32 << 10

// Gateway is one front door. It is an http.Handler; requests to Functions without a free Instance need Run to be running.
// Safe for concurrent use.
type Gateway struct {
	config     Config
	metrics    *metrics
	strangers  *functionMetrics // requests that lead to no Function
	table      *table
	dispatcher *inbox[*function] // whose queues want looking at
	infirmary  *inbox[patient]
	urgent     chan struct{}       // holds one: the reporter has load to send at once
	news       chan struct{}       // holds one: the reporter has something to acknowledge at once
	bodies     *semaphore.Weighted // bytes of bodies that are held while their requests wait
	buffers    *relay.Buffers
	errorLog   *log.Logger
	active     sync.WaitGroup // requests, those with a taken-over connection included
}

// New returns a gateway that knows no Function yet.
func New(c Config) (*Gateway, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, err
	}
	m, err := newMetrics(c.Registerer)
	if err != nil {
		return nil, fmt.Errorf("gateway: register metrics: %w", err)
	}
	g := &Gateway{
		config: c, metrics: m, strangers: m.function(""), dispatcher: newInbox[*function](), infirmary: newInbox[patient](), urgent: make(chan struct{}, 1), news: make(chan struct{}, 1),
		bodies: semaphore.NewWeighted(maxHeldBytes), buffers: relay.NewBuffers(copyBytes),
		errorLog: slog.NewLogLogger(c.Logger.Handler(), slog.LevelDebug),
	}
	g.table = newTable(&g.config, m, g.dispatcher.put, g.hurry, g.tell)
	return g, nil
}

// Synced is closed once the gateway knows all Functions that there were when it first reached poolmanager.
func (g *Gateway) Synced() <-chan struct{} { return g.table.synced }

// Run serves on l, which it closes, and does the work behind the handler, until ctx is done: then it stops accepting, lets
// requests in flight finish within Config.DrainTime (activations go on for those who wait), cuts off the rest, and makes a
// final report. The error is nil unless serving failed or requests had to be cut off.
func (g *Gateway) Run(ctx context.Context, l net.Listener) error {
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var workers sync.WaitGroup
	workers.Go(func() { g.watch(work) })
	workers.Go(func() { g.report(work) })
	workers.Go(func() { g.dispatch(work) })
	workers.Go(func() {
		g.infirmary.run(work, func(p patient, begin func(func())) { begin(func() { g.examine(work, p) }) })
	})
	err := g.serve(ctx, l)
	stop()
	workers.Wait()
	g.send(context.WithoutCancel(ctx), false)
	for _, f := range g.table.all() {
		f.close()
	}
	return err
}

func (g *Gateway) serve(ctx context.Context, l net.Listener) error {
	base, cutOff := context.WithCancel(context.WithoutCancel(ctx))
	defer cutOff()
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Handler: g, Protocols: protocols, ErrorLog: g.errorLog,
		ReadHeaderTimeout: headerTime, IdleTimeout: idleTime, MaxHeaderBytes: maxHeaderBytes,
		BaseContext: func(net.Listener) context.Context { return base },
	}
	failed := make(chan error, 1)
	go func() {
		g.awaitFirstWord(ctx)
		failed <- server.Serve(relay.Listener(l))
	}()
	select {
	case err := <-failed:
		cutOff()
		err = errors.Join(fmt.Errorf("serve %s: %w", l.Addr(), err), server.Close())
		<-g.idle()
		return err
	case <-ctx.Done():
	}
	patient, done := context.WithTimeout(base, g.config.DrainTime)
	defer done()
	err := server.Shutdown(patient)
	<-failed
	if idle := g.idle(); err == nil {
		select { // Shutdown does not wait for connections that were taken over
		case <-idle:
			return nil
		case <-patient.Done():
		}
	}
	cutOff()
	_ = server.Close()
	<-g.idle()
	return fmt.Errorf("drain: requests were still in flight after %s and have been cut off", g.config.DrainTime)
}

// awaitFirstWord waits a little for poolmanager to tell of its Functions. Until then connections wait in the kernel, which bounds
// them, instead of being told that no Function is known: a gateway that is started again is soon what it was.
func (g *Gateway) awaitFirstWord(ctx context.Context) {
	late := time.NewTimer(firstWordTime)
	defer late.Stop()
	select {
	case <-g.Synced():
	case <-late.C:
	case <-ctx.Done():
	}
}

// idle is closed when no request is here. It must not be called while new ones may come in.
func (g *Gateway) idle() <-chan struct{} {
	idle := make(chan struct{})
	go func() {
		g.active.Wait()
		close(idle)
	}()
	return idle
}

// close lets go of a function's connections when the gateway ends.
func (f *function) close() {
	f.mu.Lock()
	defer f.unlock()
	f.retired = append(f.retired, f.endpoints...)
	if f.alarm != nil {
		f.alarm.Stop()
	}
}

// ServeHTTP routes, admits and proxies one request.
func (g *Gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.active.Add(1)
	defer g.active.Done()
	arrived := time.Now()
	f, to, err := g.route(r)
	if err != nil {
		no := asRefusal(err)
		g.strangers.request(no.status, time.Since(arrived))
		no.write(w)
		return
	}
	x := newExchange(g, f, to, arrived)
	x.serve(w, r)
}

func (g *Gateway) route(r *http.Request) (*function, route, error) {
	if r.Method == http.MethodConnect {
		return nil, route{}, &refusal{
			status: http.StatusMethodNotAllowed, code: "method_not_allowed",
			reason: "this is no forward proxy", next: "use another method than CONNECT",
		}
	}
	return g.table.find(parseRoute(r.Host, r.URL.EscapedPath(), g.config.Domain))
}
