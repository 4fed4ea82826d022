package gateway

import (
	"net"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// apply brings the function to an Endpoints event and says whether it did: an event that is not newer changes nothing.
func (f *function) apply(event *hearthv1.Endpoints, now time.Time) bool {
	f.mu.Lock()
	defer f.unlock()
	if event.GetVersion() <= f.version {
		return false
	}
	f.version = event.GetVersion()
	f.limits = limitsOf(event.GetSpec())
	if f.revision != event.GetRevision() { // what failed before says nothing of this one
		f.revision = event.GetRevision()
		f.failures, f.retryAt = 0, time.Time{}
	}
	listed := make(map[string]bool, len(event.GetInstances()))
	for _, in := range event.GetInstances() {
		listed[keyOf(in)] = true
		f.see(in)
	}
	for _, e := range f.endpoints {
		if e.omitted = !listed[e.key()]; e.omitted && e.confirmed {
			e.dials.abandon() // its node may have vanished: nothing would answer until the time for it is over
		}
	}
	f.sweep(now)
	f.roomMade()
	f.pump(now)
	if f.waiting.Len() > 0 {
		f.wake(f)
	}
	return true
}

// see takes in one Instance of an event. An event's word counts more than gone, which is about replies.
func (f *function) see(in *hearthv1.Instance) {
	serving := in.GetState() == hearthv1.State_STATE_SERVING
	e := f.endpoint(keyOf(in))
	if e == nil && serving && validAddress(in.GetAddress()) {
		e = newEndpoint(in, f.config)
		f.endpoints = append(f.endpoints, e)
	}
	if !serving {
		f.gone.add(keyOf(in))
	}
	if e == nil {
		return
	}
	e.confirmed = true
	if !serving { // never back: a draining Instance ends, or comes back under another claim
		e.draining = true
	}
}

// bury marks the function deleted: those who wait are told, those in flight may end.
func (f *function) bury(version int64, now time.Time) {
	f.mu.Lock()
	defer f.unlock()
	f.version = max(f.version, version)
	f.deleted = true
	f.refuseAll(unknownFunction(f.name), now)
	for _, e := range f.endpoints {
		e.draining = true
	}
	f.sweep(now)
	if f.alarm != nil {
		f.alarm.Stop()
	}
}

// empty says whether no request is at any endpoint.
func (f *function) empty() bool {
	f.mu.Lock()
	defer f.unlock()
	for _, e := range f.endpoints {
		if e.inFlight > 0 {
			return false
		}
	}
	return true
}

func validAddress(address string) bool {
	host, port, err := net.SplitHostPort(address)
	return err == nil && host != "" && port != "" && port != "0"
}

// load is what there is to report, whether there is anything, and the reading to take off once it is delivered.
// An Instance without load is reported too, as a zero: silence would hold the scale.
func (f *function) load(now time.Time) (*hearthv1.Load, sample, bool) {
	f.mu.Lock()
	defer f.unlock()
	f.sweep(now)
	s := f.meter.read(now)
	f.urgent = false
	l := &hearthv1.Load{
		Function: f.name, Concurrency: s.concurrency(), Requests: s.requests,
		Queued: int32(f.waiting.Len()), InFlight: map[string]int32{}, Interval: durationpb.New(s.interval),
	}
	for _, e := range f.endpoints {
		if e.inFlight > 0 {
			l.InFlight[e.id] += int32(e.inFlight)
		}
	}
	busy := s.area > 0 || s.requests > 0 || f.meter.current > 0
	return l, s, busy || f.reported || len(f.endpoints) > 0
}

// isUrgent says whether the first request of an idle time waits to be reported.
func (f *function) isUrgent() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.urgent
}

// delivered takes a reading off that poolmanager has got.
func (f *function) delivered(s sample) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.meter.delivered(s)
	f.reported = s.area > 0 || s.requests > 0
}

// skipped forgets an interval in which nothing was and nothing is to be reported.
func (f *function) skipped(s sample) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.area == 0 && s.requests == 0 {
		f.meter.delivered(s)
	}
}
