/* SPDX-License-Identifier: Apache-2.0 */
/* version.h - what this build calls itself: in Stats, --version and the first line of the log. */
#ifndef KV_SERVICE_VERSION_H
#define KV_SERVICE_VERSION_H

#define KV_VERSION "0.1.0"

#endif
