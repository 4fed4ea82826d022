package kubetest

import (
	"io"
	"net"
	"net/http"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// forward is the kubelet's side of a forwarded port, by SPDY alone, so that clients have to fall back to it.
func (s *Server) forward(w http.ResponseWriter, r *http.Request, pod string) {
	if r.Method != http.MethodPost {
		http.Error(w, "no WebSocket here", http.StatusBadRequest)
		return
	}
	if _, err := httpstream.Handshake(r, w, []string{portforward.PortForwardProtocolV1Name}); err != nil {
		return
	}
	var streams sync.WaitGroup
	conn := spdy.NewResponseUpgrader().UpgradeResponse(w, r, func(stream httpstream.Stream, sent <-chan struct{}) error {
		streams.Go(func() {
			<-sent
			s.serve(stream, pod)
		})
		return nil
	})
	if conn == nil {
		return
	}
	defer conn.Close()
	<-conn.CloseChan()
	streams.Wait()
}

// serve copies between one connection and what the pod's port leads to. Errors close it: the client sees that.
func (s *Server) serve(stream httpstream.Stream, pod string) {
	defer stream.Close()
	if stream.Headers().Get(corev1.StreamType) != corev1.StreamTypeData {
		return
	}
	behind, err := net.Dial("tcp", s.Ports[pod])
	if err != nil {
		return
	}
	defer behind.Close()
	var up sync.WaitGroup
	up.Go(func() { _, _ = io.Copy(behind, stream) })
	_, _ = io.Copy(stream, behind)
	_ = stream.Reset()
	up.Wait()
}
